"""Whole networks against the golden vectors, sizes and costs against the published table, fusing, precision."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import model
from model.blocks import BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM
from model.summary import PARTS as SUMMARY_PARTS
from model.summary import Summary, summarize
from model.yolo_nas import VARIANTS, YoloNAS

# Absolute tolerances of the golden README: (logits, boxes in pixels, scores)
FLOAT64 = (5e-6, 1e-4, 1e-6)
FLOAT32 = (2e-4, 2e-2, 5e-5)

# Published: parameters of the training and deploy forms, then multiply-adds of both at 640x640 in units of 1e9
SIZES = {
    "n": (5_789_423, 5_469_036, 8.457, 7.924),
    "s": (12_878_304, 12_167_580, 16.939, 15.899),
    "m": (33_861_346, 31_893_980, 47.093, 43.880),
    "l": (44_529_448, 41_984_956, 64.493, 59.917),
}
PARTS = {
    "n": (3_936_523, 1_059_400, 793_500),
    "s": (8_899_772, 2_231_784, 1_746_748),
    "m": (21_306_364, 8_773_866, 3_781_116),
    "l": (27_300_604, 10_639_216, 6_589_628),
}
CONVOLUTIONS = {"n": (41, 42, 15), "s": (43, 42, 15), "m": (43, 46, 15), "l": (43, 58, 15)}
FORWARD_CASES = [
    ("s", "s_b2_256x320"),
    ("s", "s_b1_320x320"),
    ("m", "m_b2_256x320"),
    ("m", "m_b1_320x320"),
    ("n", "n_b1_192x256"),
]


def _network(golden, small_network, variant: str) -> nn.Module:
    return copy.deepcopy(small_network) if variant == "s" else golden.fill(model.build(variant, 80)).eval()


def _check_forward(network: nn.Module, golden, case: str, dtype: torch.dtype, tolerances) -> None:
    logits_tolerance, box_tolerance, score_tolerance = tolerances
    expected = golden.tensors(f"fwd_{case}_raw")
    images = expected["image"].to(torch.float32) / 255
    with torch.inference_mode():
        (boxes_xyxy, scores), raw = network(images.to(dtype))
    _close(raw.class_logits, expected["cls_logits"], logits_tolerance)
    _close(raw.box_distribution_logits, expected["reg_logits"], logits_tolerance)
    assert raw.anchors_per_level == expected["num_anchors"].tolist()
    if case.startswith("n"):  # only raw outputs are recorded for it
        return
    decoded = golden.tensors(f"fwd_{case}_decoded")
    _close(boxes_xyxy, decoded["boxes"], box_tolerance)
    _close(scores, decoded["scores"], score_tolerance)
    for name, value in [
        ("anchors", raw.anchors_xyxy),
        ("anchor_points", raw.anchor_points),
        ("strides", raw.strides),
    ]:
        _close(value, decoded[name], 0.0)  # multiples of one half: exact in any precision


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant, case", FORWARD_CASES)
def test_float64_forward_equals_golden(golden, small_network, variant, case):
    _check_forward(_network(golden, small_network, variant).double(), golden, case, torch.float64, FLOAT64)


@pytest.mark.parametrize("variant, case", FORWARD_CASES)
def test_float32_forward_equals_golden_unfused_and_fused(golden, small_network, variant, case):
    network = _network(golden, small_network, variant)
    _check_forward(network, golden, case, torch.float32, FLOAT32)
    network.fuse()
    assert network.fused
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    _check_forward(network, golden, case, torch.float32, FLOAT32)


@pytest.mark.parametrize("variant, listing", [("n", "n_det_keys"), ("s", "s_keys"), ("m", "m_keys")])
def test_state_keys_are_the_references_without_idle_placeholders(golden, variant, listing):
    ours = {key: list(value.shape) for key, value in model.build(variant, 80).state_dict().items()}
    theirs = {key: shape for key, shape in golden.json(listing)["keys"] if ".rbr_reparam." not in key}
    assert ours == theirs


def test_probes_inside_the_network(golden, small_network):
    """54 intermediate tensors of S: the first that differs names the wrong layer."""
    probes = golden.json("probes_s_b1_320x320")["probes"]
    captured: dict[str, Tensor] = {}

    def capture(name: str):
        def hook(_module, _inputs, output):
            parts = (
                {f"{name}[{i}]": part for i, part in enumerate(output)} if isinstance(output, tuple) else {name: output}
            )
            captured.update({key: part.detach().clone() for key, part in parts.items()})

        return hook

    network = copy.deepcopy(small_network).double()
    for name, module in network.named_modules():
        if name in {probe.split("[")[0] for probe in probes}:
            module.register_forward_hook(capture(name))
    images = golden.tensors("fwd_s_b1_320x320_raw")["image"].to(torch.float32) / 255
    with torch.no_grad():
        network(images.double())
    assert set(captured) == set(probes)
    for name, probe in probes.items():
        assert list(captured[name].shape) == probe["shape"], name
        sampled = captured[name].reshape(-1)[probe["flat_index"]]
        expected = torch.tensor(probe["values"], dtype=torch.float64)
        assert (sampled - expected).abs().max() < 1e-5, name  # probes pass two float64 programs, some 1e-6 apart
        assert captured[name].norm().item() == pytest.approx(probe["l2"], rel=1e-6), name


def _on_meta_device(variant: str) -> YoloNAS:
    """A network without memory for its weights: sizes and costs need none."""
    with torch.device("meta"):
        return model.build(variant, 80).eval()


def _multiply_adds(network: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 640, 640, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("variant", SIZES)
def test_parameters_and_costs_equal_the_table(variant):
    trained, deployed, trained_cost, deployed_cost = SIZES[variant]
    network = _on_meta_device(variant)
    parts = tuple(_count(part) for part in (network.backbone, network.neck, network.heads))
    assert parts == PARTS[variant]
    assert _count(network) == trained
    assert _multiply_adds(network) == pytest.approx(trained_cost, abs=5e-4)  # the table has three decimals
    network.fuse()
    alphas = sum(1 for name, _ in network.named_parameters() if name.endswith(".alpha"))
    assert _count(network) - alphas == deployed
    assert _multiply_adds(network) == pytest.approx(deployed_cost, abs=5e-4)


@pytest.mark.parametrize("variant", SIZES)
def test_summary_equals_the_table(variant):
    """Its figures are added up layer by layer, those above are counted by torch."""
    summary = summarize(variant, 80, 640, 640)
    trained, deployed, trained_cost, deployed_cost = SIZES[variant]
    training, deploy = summary.total()
    assert (training.parameters, deploy.parameters) == (trained, deployed)
    assert training.multiply_adds / 1e9 == pytest.approx(trained_cost, abs=5e-4)
    assert deploy.multiply_adds / 1e9 == pytest.approx(deployed_cost, abs=5e-4)
    assert tuple(summary.total(part)[0].parameters for part in SUMMARY_PARTS) == PARTS[variant]
    assert tuple(_layers(summary, part) for part in SUMMARY_PARTS) == CONVOLUTIONS[variant]


def _layers(summary: Summary, part: str) -> int:
    return sum(layer.name.startswith(part) for layer in summary.layers)


def test_summary_of_the_deploy_form_is_that_of_the_folded_network():
    summary = summarize("pico", 3, 96, 160)
    network = model.build("pico", 3).eval().fuse()
    for layer in summary.layers:
        folded = network.get_submodule(layer.name)
        assert layer.deploy.parameters == sum(parameter.numel() for parameter in folded.parameters()), layer.name
    assert summary.total()[1].parameters == sum(p.numel() for p in network.parameters()) - len(summary.scaled_shortcuts)


def test_summary_knows_the_shape_of_every_layer():
    summary = summarize("pico", 3, 96, 160)
    shapes = {layer.name: layer.output_shape for layer in summary.layers}
    network, seen = model.build("pico", 3), {}
    for name in shapes:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
    network(torch.zeros(2, 3, 96, 160))
    assert shapes == seen
    first, *_, last = summary.layers
    assert (first.name, first.kind, last.name) == ("backbone.stem.conv", "QARepVGG 3x3/2", "heads.head3.reg_pred")
    with pytest.raises(ValueError, match=r"the input size must be a positive multiple of 32, got 96x0"):
        summarize("pico", 3, 96, 0)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_pico_is_small():
    assert 200_000 <= _count(model.build("pico", 10)) <= 400_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_norm_has_the_published_constants(variant):
    norms = [module for module in _on_meta_device(variant).modules() if isinstance(module, nn.BatchNorm2d)]
    assert (
        {(norm.eps, norm.momentum) for norm in norms} == {(BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM)} == {(1e-3, 0.03)}
    )


def test_class_bias_starts_at_one_percent():
    network = model.build("pico", 3)
    for head in (network.heads.head1, network.heads.head2, network.heads.head3):
        assert head.cls_pred.bias.detach().numpy() == pytest.approx(np.full(3, -4.59512), abs=1e-5)
        assert head.reg_pred.bias.detach().abs().max() > 0  # torch's default, not a constant


def test_batch_of_two_equals_two_of_one():
    network = model.build("pico", 4).double().eval()
    images = torch.rand(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        (together, _), _ = network(images)
        alone = torch.cat([network(image[None])[0][0] for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)  # float64; sums may be ordered otherwise


def test_shapes_and_anchor_order():
    (boxes_xyxy, scores), raw = model.build("pico", 4).eval()(torch.rand(2, 3, 64, 96))
    assert boxes_xyxy.shape == (2, 126, 4) and scores.shape == (2, 126, 4)
    assert raw.class_logits.shape == (2, 126, 4) and raw.box_distribution_logits.shape == (2, 126, 68)
    assert raw.anchors_per_level == [96, 24, 6]
    assert raw.strides[[0, 95, 96, 119, 120, 125], 0].tolist() == [8, 8, 16, 16, 32, 32]
    assert raw.anchor_points[:2].tolist() == [[4, 4], [12, 4]]  # columns run fastest
    assert raw.anchors_xyxy[0].tolist() == [-16, -16, 24, 24]
    assert [level.shape[2:] for level in raw.features] == [(8, 12), (4, 6), (2, 3)]


def test_decoding_worked_example():
    """All mass on bin 2 left, 1 top, 3 right, 0 bottom at stride 8 around (4, 4)."""
    from model.head import decode_boxes, make_anchor_grid

    grid = make_anchor_grid([(1, 1), (0, 0), (0, 0)], torch.device("cpu"), torch.float32)
    logits = torch.full((1, 1, 4, 17), -100.0)
    for side, distance in enumerate([2, 1, 3, 0]):
        logits[0, 0, side, distance] = 100.0
    assert decode_boxes(logits.reshape(1, 1, 68), grid).tolist() == [[[4 - 16, 4 - 8, 4 + 24, 4]]]


def test_grid_made_for_inference_serves_training():
    """Tensors made in inference mode cannot enter autograd; the cached grid must not be one."""
    network = model.build("pico", 2)
    with torch.inference_mode():
        network(torch.rand(1, 3, 64, 64))
    (boxes_xyxy, _), _ = network(torch.rand(2, 3, 64, 64))
    boxes_xyxy.sum().backward()
    assert len(network.heads._grids) == 1
    assert not any("grid" in key or "anchor" in key for key in network.state_dict())


def test_half_precision_still_yields_float32_boxes():
    network = model.build("pico", 2).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        (boxes_xyxy, scores), raw = network(torch.rand(1, 3, 64, 64))
    assert {boxes_xyxy.dtype, scores.dtype, raw.class_logits.dtype} == {torch.float32}


def test_fused_copy_equals_the_network_and_leaves_it_alone():
    network = model.build("pico", 3)
    for _ in range(3):  # give the running statistics values of their own
        network(torch.rand(4, 3, 64, 64))
    network.eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        (expected, _), _ = network(images)
        fused = network.fused_copy()
        (actual, _), _ = fused.fuse()(images)  # fusing again changes nothing
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)  # float32 boxes in pixels, golden README
    assert fused.fused and not network.fused
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_fuse_refuses_training_mode():
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        model.build("pico", 2).train().fuse()


def test_size_must_be_a_multiple_of_32():
    with pytest.raises(ValueError, match=r"multiples of 32, got 64x50"):
        model.build("pico", 2)(torch.rand(1, 3, 64, 50))


@pytest.mark.parametrize(
    "variant, num_classes, message", [("x", 2, "choose one of pico, t, n"), ("pico", 0, "at least 1")]
)
def test_build_refuses_what_does_not_exist(variant, num_classes, message):
    with pytest.raises(ValueError, match=message):
        model.build(variant, num_classes)


def test_importing_the_package_imports_nothing_heavy(repository):
    code = "import sys, model; print(sorted({'torch', 'numpy', 'cv2'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow  # the exporter alone takes five seconds
def test_dynamo_export_equals_the_network(tmp_path):
    """The decode exports with a free batch axis, and tracing leaves nothing behind in the anchor cache."""
    import onnxruntime

    network = model.build("pico", 2).eval().fuse()

    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return self.network(images)[0]

    program = torch.onnx.export(
        Decoded().eval(),
        (torch.rand(2, 3, 64, 64),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        verbose=False,
    )
    program.save(tmp_path / "pico.onnx")
    assert not network.heads._grids
    images = torch.rand(3, 3, 64, 64)
    session = onnxruntime.InferenceSession(tmp_path / "pico.onnx", providers=["CPUExecutionProvider"])
    boxes_xyxy, scores = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        (expected_boxes, expected_scores), _ = network(images)
    np.testing.assert_allclose(boxes_xyxy, expected_boxes, rtol=0, atol=2e-2)  # float32 tolerances of the golden README
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=5e-5)
