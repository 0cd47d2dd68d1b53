"""The table: how each network is made, and on inputs of which shapes it is compiled.

Each is made by one call, ``module.call``, as a person who has the wheel would. Shapes are the network's usual ones, or
with ``usual`` smaller ones: the architecture stays, two cores finish sooner.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

VISION, VIDEO = "torchvision.models.video", "pytorchvideo.models.hub"
MONAI, NNUNET = "monai.networks.nets", "dynamic_network_architectures.architectures"
VOLUMES, UNET3D, OWN = "timm_3d", "pytorch3dunet.unet3d.model", "benchmarks.published"


@dataclass(frozen=True)
class Network:
    """One row: ``shapes`` are the inputs', ``usual`` the first input's where that is larger."""

    name: str
    module: str
    call: str
    shapes: str
    usual: str = ""

    def create(self) -> nn.Module:
        """The network with seeded random weights, in inference mode."""
        torch.manual_seed(0)
        if self.module.startswith(("torchvision", "pytorchvideo", "timm", "vit_pytorch")):
            declare_torchvision()
        function = self.call.partition("(")[0]
        # The text is the table's own, below: documentation and code in one.
        network: nn.Module = eval(self.call, {"nn": nn, function: getattr(import_module(self.module), function)})
        randomise(network)
        return network.eval().requires_grad_(False)

    def inputs(self, network: nn.Module) -> list[torch.Tensor]:
        """Seeded inputs, mean 0 and deviation 1; a stream's states follow its frames."""
        generator = torch.Generator().manual_seed(1)
        if self.shapes.startswith("pixels "):
            return [torch.randint(256, _extents(self.shapes.split()[1]), generator=generator).byte()]
        shapes = [_extents(shape) for shape in self.shapes.split()]
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        return [*inputs, *network.first_states(shapes[0][-1])] if hasattr(network, "first_states") else inputs


def _extents(text: str) -> tuple[int, ...]:
    return tuple(int(extent) for extent in text.split("x"))


def declare_torchvision() -> None:
    """Let torchvision's Python half be imported where its compiled half, made for CUDA, cannot be loaded."""
    if _KEPT:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[Any] = []


def randomise(network: nn.Module) -> None:
    """Statistics and weights that no training has moved, as a trained network has them: not all zero, not all one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.8, 1.2, generator=generator)
        for parameter in network.parameters():
            if parameter.numel() == 0:
                continue
            first = parameter.reshape(-1)[0]
            if (parameter == first).all():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


NETWORKS = (
    Network("r3d_18", VISION, "r3d_18()", "1x3x8x56x56", "1x3x16x112x112"),
    Network("mc3_18", VISION, "mc3_18()", "1x3x8x56x56", "1x3x16x112x112"),
    Network("r2plus1d_18", VISION, "r2plus1d_18()", "1x3x8x56x56", "1x3x16x112x112"),
    Network("s3d", VISION, "s3d()", "1x3x16x224x224"),
    Network("mvit_v1_b", OWN + ".deployed", "mvit('mvit_v1_b', 8, 64)", "1x3x8x64x64", "1x3x16x224x224"),
    Network("mvit_v2_s", OWN + ".deployed", "mvit('mvit_v2_s', 8, 64)", "1x3x8x64x64", "1x3x16x224x224"),
    Network("swin3d_t", VISION, "swin3d_t()", "1x3x8x64x64", "1x3x32x224x224"),
    Network("swin3d_s", VISION, "swin3d_s()", "1x3x8x64x64", "1x3x32x224x224"),
    Network("swin3d_b", VISION, "swin3d_b()", "1x3x8x64x64", "1x3x32x224x224"),
    Network("x3d_xs", VIDEO, "x3d_xs()", "1x3x4x160x160"),
    Network("x3d_s", VIDEO, "x3d_s()", "1x3x13x160x160"),
    Network(
        "x3d_m",
        "pytorchvideo.models.x3d",
        "create_x3d(input_clip_length=8, input_crop_size=96)",
        "1x3x8x96x96",
        "1x3x16x224x224",
    ),
    Network(
        "x3d_l",
        "pytorchvideo.models.x3d",
        "create_x3d(input_clip_length=8, input_crop_size=96, depth_factor=5.0)",
        "1x3x8x96x96",
        "1x3x16x312x312",
    ),
    Network("efficient_x3d_xs", VIDEO, "efficient_x3d_xs()", "1x3x4x160x160"),
    Network("efficient_x3d_s", VIDEO, "efficient_x3d_s()", "1x3x13x160x160"),
    Network("efficient_x3d_xs deployed", OWN + ".deployed", "efficient_x3d_xs()", "1x3x4x160x160"),
    Network(
        "slow_r50",
        "pytorchvideo.models.resnet",
        "create_resnet(head_pool_kernel_size=(4, 3, 3))",
        "1x3x4x96x96",
        "1x3x8x256x256",
    ),
    Network(
        "i3d_r50",
        "pytorchvideo.models.resnet",
        "create_resnet(stem_conv_kernel_size=(5, 7, 7), stage1_pool=nn.MaxPool3d, stage_conv_a_kernel_size="
        "((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)]), "
        "head_pool_kernel_size=(2, 3, 3))",
        "1x3x4x96x96",
        "1x3x8x224x224",
    ),
    Network(
        "c2d_r50",
        "pytorchvideo.models.resnet",
        "create_resnet(stage1_pool=nn.MaxPool3d, stage_conv_a_kernel_size=((1, 1, 1),) * 4, "
        "head_pool_kernel_size=(2, 3, 3))",
        "1x3x4x96x96",
        "1x3x8x224x224",
    ),
    Network(
        "csn_r101",
        "pytorchvideo.models.csn",
        "create_csn(model_depth=101, stem_pool=nn.MaxPool3d, head_pool_kernel_size=(1, 2, 2))",
        "1x3x8x64x64",
        "1x3x32x224x224",
    ),
    Network("r2plus1d_r50", VIDEO, "r2plus1d_r50(head_pool_kernel_size=(2, 2, 2))", "1x3x8x64x64", "1x3x16x224x224"),
    Network("slowfast_r50", OWN + ".deployed", "slowfast(50)", "1x3x2x64x64 1x3x8x64x64", "1x3x8x256x256"),
    Network("slowfast_r101", OWN + ".deployed", "slowfast(101)", "1x3x2x64x64 1x3x8x64x64", "1x3x8x256x256"),
    Network(
        "mvit_base_16x4",
        VIDEO,
        "mvit_base_16x4(spatial_size=64, temporal_size=8)",
        "1x3x8x64x64",
        "1x3x16x224x224",
    ),
    Network(
        "UNet", MONAI, "UNet(3, 1, 2, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)", "1x1x32x32x32", "1x1x96x96x96"
    ),
    Network("BasicUNet", MONAI, "BasicUNet(3, 1, 2)", "1x1x32x32x32", "1x1x96x96x96"),
    Network(
        "BasicUNet by trilinear",
        MONAI,
        "BasicUNet(3, 1, 2, upsample='nontrainable')",
        "1x1x32x32x32",
        "1x1x96x96x96",
    ),
    Network("BasicUNetPlusPlus", MONAI, "BasicUNetPlusPlus(3, 1, 2)", "1x1x32x32x32", "1x1x96x96x96"),
    Network("SegResNet", MONAI, "SegResNet(3, 8, 1, 2)", "1x1x32x32x32", "1x1x96x96x96"),
    Network("SegResNetDS", MONAI, "SegResNetDS(3, 16, 1, 2)", "1x1x32x32x32", "1x1x96x96x96"),
    Network(
        "DynUNet",
        MONAI,
        "DynUNet(3, 1, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], res_block=True)",
        "1x1x32x32x32",
        "1x1x96x96x96",
    ),
    Network("UNETR", MONAI, "UNETR(1, 2, (32, 32, 32))", "1x1x32x32x32", "1x1x96x96x96"),
    Network("SwinUNETR", MONAI, "SwinUNETR(1, 2, feature_size=12)", "1x1x64x64x64", "1x1x96x96x96"),
    Network("VNet", MONAI, "VNet()", "1x1x32x32x32", "1x1x96x96x96"),
    Network(
        "AttentionUnet", MONAI, "AttentionUnet(3, 1, 2, (16, 32, 64, 128), (2, 2, 2))", "1x1x32x32x32", "1x1x96x96x96"
    ),
    Network("DenseNet121", MONAI, "DenseNet121(3, 1, 2)", "1x1x48x48x48", "1x1x96x96x96"),
    Network(
        "SEResNet50", MONAI, "SEResNet50(spatial_dims=3, in_channels=1, num_classes=2)", "1x1x48x48x48", "1x1x96x96x96"
    ),
    Network("ResNet-18 3D", MONAI, "resnet18(n_input_channels=1)", "1x1x32x32x32", "1x1x96x96x96"),
    Network("ResNet-50 3D", MONAI, "resnet50(n_input_channels=1)", "1x1x32x32x32", "1x1x96x96x96"),
    Network(
        "EfficientNet-B0 3D",
        MONAI,
        "EfficientNetBN('efficientnet-b0', pretrained=False, spatial_dims=3, in_channels=1)",
        "1x1x48x48x48",
        "1x1x96x96x96",
    ),
    Network("HighResNet", MONAI, "HighResNet(3, 1, 2)", "1x1x16x16x16", "1x1x96x96x96"),
    Network("ViT 3D", MONAI, "ViT(1, (32, 32, 32), (16, 16, 16), classification=True)", "1x1x32x32x32", "1x1x96x96x96"),
    Network("MedNeXt-S", MONAI, "MedNeXtS()", "1x1x32x32x32", "1x1x96x96x96"),
    Network(
        "FlexibleUNet",
        MONAI,
        "FlexibleUNet(1, 2, 'efficientnet-b0', spatial_dims=3)",
        "1x1x64x64x64",
        "1x1x96x96x96",
    ),
    Network(
        "nnU-Net plain",
        NNUNET + ".unet",
        "PlainConvUNet(1, 4, (16, 32, 64, 128), nn.Conv3d, 3, (1, 2, 2, 2), 2, 2, 2, True, nn.InstanceNorm3d, "
        "{'eps': 1e-5, 'affine': True}, nonlin=nn.LeakyReLU)",
        "1x1x32x32x32",
        "1x1x128x128x128",
    ),
    Network(
        "nnU-Net residual",
        NNUNET + ".unet",
        "ResidualEncoderUNet(1, 4, (16, 32, 64, 128), nn.Conv3d, 3, (1, 2, 2, 2), (1, 3, 4, 6), 2, (1, 1, 1), True, "
        "nn.InstanceNorm3d, {'eps': 1e-5, 'affine': True}, nonlin=nn.LeakyReLU)",
        "1x1x32x32x32",
        "1x1x128x128x128",
    ),
    Network("UNet3D", UNET3D, "UNet3D(1, 2, f_maps=16)", "1x1x16x32x32", "1x1x64x128x128"),
    Network(
        "ResidualUNet3D", UNET3D, "ResidualUNet3D(1, 2, f_maps=16, num_levels=4)", "1x1x16x32x32", "1x1x64x128x128"
    ),
    Network(
        "ResidualUNetSE3D", UNET3D, "ResidualUNetSE3D(1, 2, f_maps=16, num_levels=4)", "1x1x16x32x32", "1x1x64x128x128"
    ),
    Network("LinkNet3d", "unet3d.linknet3d", "LinkNet3d(1, 2)", "1x1x64x64x64", "1x1x96x96x96"),
    Network("timm_3d resnet18", VOLUMES, "create_model('resnet18')", "1x3x32x32x32", "1x3x96x96x96"),
    Network("timm_3d efficientnet_b0", VOLUMES, "create_model('efficientnet_b0')", "1x3x48x48x48", "1x3x96x96x96"),
    Network("timm_3d densenet121", VOLUMES, "create_model('densenet121')", "1x3x48x48x48", "1x3x96x96x96"),
    Network("timm_3d convnext_atto", VOLUMES, "create_model('convnext_atto')", "1x3x32x32x32", "1x3x96x96x96"),
    Network("TSN resnet18", OWN + ".video", "tsn('resnet18')", "1x4x3x64x64", "1x8x3x224x224"),
    Network(
        "TSN mobilenetv3_small_100", OWN + ".video", "tsn('mobilenetv3_small_100')", "1x4x3x96x96", "1x8x3x224x224"
    ),
    Network("TSN convnext_atto", OWN + ".video", "tsn('convnext_atto')", "1x4x3x64x64", "1x8x3x224x224"),
    Network("TSM resnet18", OWN + ".video", "tsm('resnet18', 4)", "1x4x3x64x64", "1x8x3x224x224"),
    Network("TSM in place resnet50", OWN + ".video", "tsm('resnet50', 4, True)", "1x4x3x64x64", "1x8x3x224x224"),
    Network("TSM mobilenetv2_100", OWN + ".video", "tsm('mobilenetv2_100', 4)", "1x4x3x96x96", "1x8x3x224x224"),
    Network("I3D", OWN + ".video", "i3d()", "1x3x16x64x64", "1x3x64x224x224"),
    Network("MoViNet-A0", OWN + ".mobile", "MoViNet()", "1x3x8x96x96", "1x3x50x172x172"),
    Network("MoViNet-A0 stream", OWN + ".mobile", "MoViNet(causal=True)", "1x3x1x96x96", "1x3x1x172x172"),
    Network("MobileNet 3D", OWN + ".mobile", "mobilenet()", "1x3x16x64x64", "1x3x16x112x112"),
    Network("MobileNetV2 3D", OWN + ".mobile", "mobilenet_v2()", "1x3x16x64x64", "1x3x16x112x112"),
    Network("ShuffleNet 3D", OWN + ".mobile", "shufflenet()", "1x3x32x64x64"),
    Network("ShuffleNetV2 3D", OWN + ".mobile", "shufflenet_v2()", "1x3x16x64x64", "1x3x16x112x112"),
    Network("SqueezeNet 3D", OWN + ".mobile", "squeezenet()", "1x3x16x64x64", "1x3x16x112x112"),
    Network("PhysNet", OWN + ".video", "PhysNet(32)", "1x3x32x32x32", "1x3x128x128x128"),
    Network("DeepPhys", OWN + ".video", "TwoStreams()", "10x6x36x36", "180x6x72x72"),
    Network("TS-CAN", OWN + ".video", "TwoStreams(frames=10)", "10x6x36x36", "180x6x72x72"),
    Network("EfficientPhys", OWN + ".video", "EfficientPhys(10, 36)", "11x3x36x36", "181x3x72x72"),
    Network("TransNetV2", "transnetv2_pytorch", "TransNetV2()", "pixels 1x20x27x48x3", "1x100x27x48x3"),
    Network(
        "ViViT",
        "vit_pytorch.vivit",
        "ViViT(image_size=64, image_patch_size=16, frames=8, frame_patch_size=2, num_classes=400, dim=192, "
        "spatial_depth=6, temporal_depth=6, heads=3, mlp_dim=768)",
        "1x3x8x64x64",
        "1x3x32x224x224",
    ),
    Network(
        "TimeSformer",
        OWN + ".deployed",
        "timesformer(image_size=64, num_frames=4, hidden_size=192, num_hidden_layers=12, num_attention_heads=3)",
        "1x4x3x64x64",
        "1x8x3x224x224",
    ),
    Network(
        "VideoMAE",
        OWN + ".deployed",
        "videomae(image_size=64, num_frames=8, hidden_size=192, num_hidden_layers=12, num_attention_heads=3)",
        "1x8x3x64x64",
        "1x16x3x224x224",
    ),
)
