"""ImageNet-1k in class folders, as it is commonly unpacked; its val split is the test split, as published."""

from __future__ import annotations

from pathlib import Path

from vpns.data.folder import list_classes, read_classes
from vpns.data.listing import Layout, Listing, Published, name_some
from vpns.data.mapped import register_layout


def read_imagenet(home: Path) -> Listing:
    """Images in train/<wnid> and val/<wnid>; a training image's name begins with its class."""
    if not (home / "val").is_dir():
        raise ValueError(f"load_imagenet: expected the folder {home / 'val'}, got none")
    class_names = list_classes(home / "train")
    splits = {
        name: read_classes(home / folder, class_names)
        for name, folder in (("train", "train"), ("test", "val"))
    }
    strangers = [
        str(file.relative_to(home))
        for file in splits["train"].files
        if file.name[0] == "n" and file.name.partition("_")[0] not in file.parts
    ]
    problem = f"{len(strangers):,} images are in another class's folder: {name_some(strangers)}"
    return Listing(class_names, splits, (problem,) if strangers else ())


register_layout(
    Layout(
        name="imagenet",
        homes=("imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "."),
        marker="train",
        read=read_imagenet,
        published=Published(1_000, 1_281_167, 50_000),
        hint="image-net.org, unpacked into train/<class> and val/<class>; of a part of it: data.name=folder",
    )
)
