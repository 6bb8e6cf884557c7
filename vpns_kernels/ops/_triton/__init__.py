"""What the triton backends share. Nothing here is imported before a backend is asked to run."""
