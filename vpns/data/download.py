"""How does a published data set come here? Fetched through torchvision, and only where that is asked for."""

from __future__ import annotations

from pathlib import Path

from vpns.data.listing import LAYOUTS, list_data
from vpns.files import make_folder


def fetch_data(name: str, given: str | Path | None) -> None:
    """Download a data set where it is not there, whole; ValueError or ConnectionError as download_data."""
    layout = LAYOUTS.get(name)
    home = None if layout is None or given is None else layout.find(Path(given).absolute())
    if layout is not None and home is not None and not list_data(layout, home).problems:
        return
    download_data(name, given)


def download_data(name: str, given: str | Path | None) -> None:
    """Fetch a data set into a folder; what is there already, whole, is not fetched again.

    Raises:
        ValueError: a data set that nobody offers for download.
        ConnectionError: what did not arrive.
    """
    layout = LAYOUTS.get(name)
    if layout is None or layout.download is None:
        offered = sorted(one.name for one in LAYOUTS.values() if one.download is not None)
        hint = f"; {layout.hint}" if layout is not None and layout.hint else ""
        raise ValueError(f"download_data: expected a name in {offered}, got {name!r}{hint}")
    if given is None:
        raise ValueError("download_data: expected data.root, the folder to download into, got None")
    root = Path(given)
    make_folder(root)
    try:
        layout.download(root)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"download_data: expected to download {name} into {root}, got {error} (run it again)"
        ) from error
