"""VGG-16 with and without batch norm, with torchvision's layers, names and start (Simonyan 2015)."""

from __future__ import annotations

from torch import Tensor, nn

from vpns.models.base import register

# Output channels of the 3x3 convolutions between one max-pooling and the next.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@register
def vgg16(num_classes: int) -> nn.Module:
    """138,357,544 parameters at 1,000 classes."""
    return VGG(num_classes, batch_norm=False)


@register
def vgg16_bn(num_classes: int) -> nn.Module:
    """138,365,992 parameters at 1,000 classes."""
    return VGG(num_classes, batch_norm=True)


class VGG(nn.Module):
    """Thirteen 3x3 convolutions, pooling to 7x7, three linear layers with dropout."""

    def __init__(self, num_classes: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for stage in _STAGES:
            for out_channels in stage:
                layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(out_channels))
                layers.append(nn.ReLU(inplace=True))
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x)).flatten(1)
        x = self.classifier(x)
        return x
