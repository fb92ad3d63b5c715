"""Other ways to run the same network: each that is installed here, with the weights of the eager model.

A peer that takes no part says why. What it computes is compared before anything is timed (``proof.admit``).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fusedres import freeze, measure
from fusedres.cli import convert, networks

EVAL, TRAIN = "eval", "train"
FROZEN = "fused, frozen"

Run = Callable[[Tensor], Tensor]
#: ``(arch, model, x) -> run``; ``model`` is a copy of the eager one, channels_last, in the mode that is timed.
Build = Callable[[str, nn.Module, Tensor], Run]


class Peer(NamedTuple):
    """``needs``: packages. ``devices``: types of devices that it runs on. ``refuses(arch, x)``: why not this, or None.

    What ``build`` returns is a module where TRAIN is among the ``modes``.
    """

    name: str
    build: Build
    modes: tuple[str, ...] = (EVAL,)
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    takes_nchw: bool = False
    refuses: Callable[[str, Tensor], str | None] = lambda arch, x: None

    def reason(self, arch: str, mode: str, x: Tensor) -> str | None:
        """Why this peer takes no part in ``mode`` with inputs like ``x``, or None."""
        if mode not in self.modes:
            return f"it does not {mode}"
        if x.device.type not in self.devices:
            return f"it does not run on {x.device.type}"
        absent = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"{', '.join(absent)} not installed" if absent else self.refuses(arch, x)


# fused with weights declared final, torch.compile, timm, torch-tensorrt


def _frozen(arch: str, model: nn.Module, x: Tensor) -> Run:
    """The network that takes part as fused, not a converted eager one, whose chains run one by one."""
    fused = networks.build(arch, num_classes=networks.classes_of(model)).eval()
    fused.load_state_dict(model.state_dict())
    return freeze(networks.place(fused, x.device, x.dtype))


def _compiled(**options: Any) -> Build:
    return lambda arch, model, x: torch.compile(model, **options)


def _timm_lacks(arch: str, x: Tensor) -> str | None:
    import timm

    return None if timm.is_model(arch) else f"timm has no {arch}"


def _timm(arch: str, model: nn.Module, x: Tensor) -> Run:
    import timm

    state = model.state_dict()
    twin = timm.create_model(arch, num_classes=len(state["fc.bias"]))
    twin.load_state_dict(state)
    return twin.to(x.device, x.dtype).to(memory_format=torch.channels_last).train(model.training)


def _torch_tensorrt(arch: str, model: nn.Module, x: Tensor) -> Run:
    import torch_tensorrt

    return torch_tensorrt.compile(model, ir="dynamo", inputs=[x], enabled_precisions={x.dtype})


# Runtimes of ONNX


def _is_no_float32(arch: str, x: Tensor) -> str | None:
    return None if x.dtype == torch.float32 else "it is run in float32 alone"


def _onnxruntime_lacks(provider: str) -> Callable[[str, Tensor], str | None]:
    def refuses(arch: str, x: Tensor) -> str | None:
        import onnxruntime

        if provider not in onnxruntime.get_available_providers():
            return f"this onnxruntime lacks {provider}"
        return _is_no_float32(arch, x)

    return refuses


def _onnxruntime(provider: str) -> Build:
    def build(arch: str, model: nn.Module, x: Tensor) -> Run:
        import numpy
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on spinning into the next contestant's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        content = convert.to_onnx(model, x).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=[provider])
        place = (x.device.type, x.device.index or 0, numpy.float32)
        logits = torch.empty_like(model(x))

        def run(x: Tensor) -> Tensor:
            binding = session.io_binding()
            binding.bind_input("pictures", *place, tuple(x.shape), x.data_ptr())
            binding.bind_output("logits", *place, tuple(logits.shape), logits.data_ptr())
            session.run_with_iobinding(binding)
            return logits

        return run

    return build


def _openvino(arch: str, model: nn.Module, x: Tensor) -> Run:
    import openvino

    core = openvino.Core()
    network = core.read_model(convert.to_onnx(model, x).SerializeToString())
    network.reshape(list(x.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the CPU has it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0])

    return run


# The vendor's fused convolutions, and apex


class CudnnNet(nn.Module):
    """torchvision's ResNet in eval, BN folded, each conv with its bias, shortcut and ReLU one call of cuDNN."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(model)
        for module in self.net.modules():
            for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
                if isinstance(getattr(module, bn, None), nn.BatchNorm2d):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn)))
                    setattr(module, bn, nn.Identity())
        self.net.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) -> logits (N, classes)."""
        net: Any = self.net
        x = net.maxpool(_conv_relu(net.conv1, x))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                x = _block(block, x)
        return net.fc(torch.flatten(net.avgpool(x), 1))


def _block(block: Any, x: Tensor) -> Tensor:
    *first, last = (getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name))
    y = x
    for conv in first:
        y = _conv_relu(conv, y)
    shortcut = x if block.downsample is None else block.downsample(x)
    geometry = (last.stride, last.padding, last.dilation, last.groups)
    return torch.cudnn_convolution_add_relu(y, last.weight, shortcut, 1.0, last.bias, *geometry)


def _conv_relu(conv: Any, x: Tensor) -> Tensor:
    return torch.cudnn_convolution_relu(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _is_for_cifar(arch: str, x: Tensor) -> str | None:
    return "it is written for torchvision's networks" if arch.startswith("cifar") else None


def _cudnn_graph(arch: str, model: nn.Module, x: Tensor) -> Run:
    net, held = CudnnNet(model), x.clone(memory_format=torch.preserve_format)
    logits: list[Tensor] = []
    replay = measure.captured(lambda: logits.append(net(held)))

    def run(x: Tensor) -> Tensor:
        held.copy_(x)
        replay()
        return logits[-1]

    return run


def with_apex_blocks(model: nn.Module, block_type: type[nn.Module]) -> nn.Module:
    """``model`` (torchvision's, in eval) with every bottleneck replaced that apex has: those of stride 1.

    Where apex strides, it does so in the first conv, torchvision in the second.
    """
    for stage in (getattr(model, f"layer{i}") for i in (1, 2, 3, 4)):
        for i, block in enumerate(stage):
            if block.stride == 1:
                width, outplanes, inplanes = block.conv2.out_channels, block.conv3.out_channels, block.conv1.in_channels
                twin = block_type(inplanes, width, outplanes, use_cudnn=True).to(block.conv1.weight)
                state = block.state_dict()
                for name, bn in block.named_modules():  # its frozen BN has no eps
                    if isinstance(bn, nn.BatchNorm2d) and bn.running_var is not None:
                        state[f"{name}.running_var"] = bn.running_var + bn.eps
                        del state[f"{name}.num_batches_tracked"]
                twin.load_state_dict(state)
                stage[i] = twin.to(memory_format=torch.channels_last)
    return model


def _apex_lacks(arch: str, x: Tensor) -> str | None:
    if x.dtype != torch.float16:
        return "apex's bottleneck is for float16"
    return None if arch in ("resnet50", "resnet101", "resnet152") else f"apex has no blocks of {arch}"


def _apex(arch: str, model: nn.Module, x: Tensor) -> Run:
    from apex.contrib.bottleneck import Bottleneck

    return with_apex_blocks(model, Bottleneck)


_CUDA = ("cuda",)

PEERS = (
    Peer(FROZEN, _frozen),
    Peer("torch.compile", _compiled(), modes=(EVAL, TRAIN)),
    Peer("torch.compile max-autotune", _compiled(mode="max-autotune"), modes=(EVAL, TRAIN)),
    Peer("torch.compile freezing", _compiled(options={"freezing": True})),
    Peer("timm", _timm, modes=(EVAL, TRAIN), needs=("timm",), refuses=_timm_lacks),
    *(
        Peer(
            f"ONNX Runtime {name}",
            _onnxruntime(provider),
            needs=("onnxruntime", "onnx", "onnxscript"),
            devices=(device_type,),
            takes_nchw=True,
            refuses=_onnxruntime_lacks(provider),
        )
        for name, provider, device_type in (
            ("CPU", "CPUExecutionProvider", "cpu"),
            ("CUDA", "CUDAExecutionProvider", "cuda"),
            ("TensorRT", "TensorrtExecutionProvider", "cuda"),
        )
    ),
    Peer(
        "OpenVINO",
        _openvino,
        needs=("openvino", "onnx", "onnxscript"),
        devices=("cpu",),
        takes_nchw=True,
        refuses=_is_no_float32,
    ),
    Peer("cuDNN fused, CUDA graph", _cudnn_graph, devices=_CUDA, refuses=_is_for_cifar),
    Peer("torch-tensorrt", _torch_tensorrt, needs=("torch_tensorrt",), devices=_CUDA),
    Peer("apex bottleneck", _apex, needs=("apex",), devices=_CUDA, refuses=_apex_lacks),
)
