"""Stanford cars, as torchvision has it (devkit, cars_train, cars_test) or in class folders as on Kaggle."""

from __future__ import annotations

from pathlib import Path

from vpns.data.folder import list_classes, read_classes
from vpns.data.listing import Layout, Listing, Published
from vpns.data.mapped import register_layout
from vpns.data.torchvision_sets import list_sets, open_set


def read_cars(home: Path) -> Listing:
    """8,144 images of 196 models to train on and 8,041 to test, the same in both layouts."""
    if home.name == "stanford_cars":
        train, test = (open_set("StanfordCars", home.parent, split=split) for split in ("train", "test"))
        return list_sets(train, {"train": [train], "test": [test]})
    for split in ("train", "test"):
        if not (home / split).is_dir():
            raise ValueError(f"load_stanford-cars: expected the folder {home / split}, got none")
    class_names = list_classes(home / "train")
    return Listing(
        class_names, {split: read_classes(home / split, class_names) for split in ("train", "test")}
    )


register_layout(
    Layout(
        name="stanford-cars",
        homes=("stanford_cars", "stanfordcars/car_data/car_data", "car_data/car_data"),
        read=read_cars,
        published=Published(196, 8_144, 8_041),
        hint="its authors' address is gone; Kaggle has it in class folders",
    )
)
