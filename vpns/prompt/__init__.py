"""The visual prompts; add a kind as a file here and it is known by its name."""

from vpns.prompt.base import PROMPTS, Prompt, build_prompt, register
from vpns.prompt.none import NoPrompt
from vpns.prompt.pad import FramedPad, ReleasedPad
from vpns.prompt.patch import PatchPrompt

__all__ = [
    "PROMPTS",
    "FramedPad",
    "NoPrompt",
    "PatchPrompt",
    "Prompt",
    "ReleasedPad",
    "build_prompt",
    "register",
]
