"""The detection loss against the golden vectors, its weights, and its equality over processes."""

from __future__ import annotations

import copy
import multiprocessing
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import model
from model.head import RawOutput, decode_boxes, make_anchor_grid
from model.loss import DetectionLoss, LossParts, Targets, distribution_focal_loss, generalized_iou, global_normalizer

LEVELS = [(12, 16), (6, 8), (3, 4)]
VARIANTS = [
    (assigner, classification) for assigner in ("task_aligned", "atss") for classification in ("varifocal", "focal")
]
SHORT_NAMES = {"task_aligned": "tal", "atss": "atss"}


@pytest.fixture
def golden_case(golden) -> tuple[dict[str, Tensor], Targets]:
    tensors = golden.tensors("loss_and_assigners")
    mask = tensors["pad_gt_mask"].squeeze(-1)
    return tensors, Targets(tensors["gt_bbox"], tensors["gt_class"].squeeze(-1), torch.ones(mask.shape), mask)


def _forward(class_logits: Tensor, box_logits: Tensor) -> tuple[RawOutput, Tensor, Tensor]:
    """The network's output form for given logits of the golden 96x128 grid."""
    grid = make_anchor_grid(LEVELS, class_logits.device, class_logits.dtype)
    raw = RawOutput(class_logits, box_logits, grid.anchors_xyxy, grid.anchor_points, [192, 48, 12], grid.strides)
    return raw, decode_boxes(box_logits, grid), class_logits.sigmoid()


def _leaves(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["logits"].clone().requires_grad_(), tensors["reg_logits"].clone().requires_grad_()


def _check_parts(parts: LossParts, expected: dict[str, float], tolerance: float) -> None:
    assert parts.classification.item() == pytest.approx(expected["loss_cls"], rel=tolerance)
    assert parts.iou.item() == pytest.approx(expected["loss_iou"], rel=tolerance, abs=1e-9)
    assert parts.distribution.item() == pytest.approx(expected["loss_dfl"], rel=tolerance, abs=1e-9)
    assert parts.total.item() == pytest.approx(expected["loss"], rel=tolerance)


@pytest.mark.parametrize("assigner, classification", VARIANTS)
def test_loss_equals_golden(golden, golden_case, assigner, classification):
    tensors, targets = golden_case
    compute_loss = DetectionLoss(5, assigner=assigner, classification=classification)
    parts = compute_loss(*_forward(*_leaves(tensors)), targets)
    expected = golden.json("loss_and_assigners")["losses"][f"{SHORT_NAMES[assigner]}_{classification}"]
    _check_parts(parts, expected, 1e-4)  # golden README


@pytest.mark.parametrize("assigner", ["task_aligned", "atss"])
def test_gradients_equal_golden(golden_case, assigner):
    tensors, targets = golden_case
    class_logits, box_logits = _leaves(tensors)
    DetectionLoss(5, assigner=assigner)(*_forward(class_logits, box_logits), targets).total.backward()
    for leaf, name in [(class_logits, "grad_logits"), (box_logits, "grad_reg_logits")]:
        expected = tensors[f"{name}_{SHORT_NAMES[assigner]}_varifocal"]
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-5)  # golden README


@pytest.mark.parametrize("assigner", ["task_aligned", "atss"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_objects_equal_golden_and_every_logit_gets_a_gradient(golden, golden_case, assigner, rows):
    tensors, _ = golden_case
    class_logits, box_logits = _leaves(tensors)
    parts = DetectionLoss(5, assigner=assigner)(*_forward(class_logits, box_logits), _empty_targets(3, rows))
    _check_parts(
        parts, golden.json("loss_and_assigners")["losses"][f"{SHORT_NAMES[assigner]}_varifocal_no_targets"], 1e-4
    )
    parts.total.backward()
    assert class_logits.grad.abs().min() > 0
    assert box_logits.grad is not None and not box_logits.grad.any()  # DDP wants a gradient, even a zero one


def _empty_targets(batch: int, rows: int) -> Targets:
    return Targets(
        torch.zeros(batch, rows, 4),
        torch.zeros(batch, rows, dtype=torch.int64),
        torch.zeros(batch, rows),
        torch.zeros(batch, rows, dtype=torch.bool),
    )


def test_weights_scale_goals_and_normaliser_alike(golden_case):
    """Halving every object's weight halves every soft score: box terms and normaliser halve, their ratio stays."""
    tensors, targets = golden_case
    forward = _forward(tensors["logits"].double(), tensors["reg_logits"].double())
    full = DetectionLoss(5)(*forward, targets)
    half = DetectionLoss(5)(*forward, replace(targets, weights=targets.weights / 2))
    soft_scores = DetectionLoss(5).assign(*forward, targets).soft_scores
    assert soft_scores.sum() > 2  # else the normaliser's floor of 1 would hide the ratio
    assert half.iou.item() == pytest.approx(full.iou.item(), rel=1e-12)
    assert half.distribution.item() == pytest.approx(full.distribution.item(), rel=1e-12)
    assert half.classification.item() != pytest.approx(full.classification.item(), rel=1e-2)


def test_one_objects_weight_scales_its_share_of_every_term(golden_case):
    """The loss in numerators is linear in one object's weight for the box terms, and follows the goal for classes."""
    tensors, targets = golden_case
    forward = _forward(tensors["logits"].double(), tensors["reg_logits"].double())
    numerators = {}
    for weight in (0.0, 0.25, 1.0):
        weights = targets.weights.clone().double()
        weights[0, 0] = weight
        weighted = replace(targets, weights=weights)
        assignment = DetectionLoss(5).assign(*forward, weighted)
        normalizer = (assignment.soft_scores * weights.gather(1, assignment.owners)).sum()
        parts = DetectionLoss(5)(*forward, weighted)
        numerators[weight] = [
            (part * normalizer).item() for part in (parts.iou, parts.distribution, parts.classification)
        ]
    for term in (0, 1):
        share = numerators[1.0][term] - numerators[0.0][term]
        assert share > 0
        assert numerators[0.25][term] - numerators[0.0][term] == pytest.approx(share / 4, rel=1e-9)
    assert numerators[0.0][2] < numerators[0.25][2] < numerators[1.0][2]  # the class goal rises with the weight


def test_class_term_of_a_pseudo_label_worked_example():
    """One perfect prediction, score 0.5: q = w, and its class element costs q * BCE(0, q) = w * ln 2."""
    grid = make_anchor_grid([(1, 1), (0, 0), (0, 0)], torch.device("cpu"), torch.float64)
    logits = torch.zeros(1, 1, 1, dtype=torch.float64)
    box_logits = torch.full((1, 1, 4, 17), -200.0, dtype=torch.float64)
    box_logits[..., 1] = 200.0  # one stride on each side
    raw = RawOutput(
        logits, box_logits.reshape(1, 1, 68), grid.anchors_xyxy, grid.anchor_points, [1, 0, 0], grid.strides
    )
    boxes = decode_boxes(raw.box_distribution_logits, grid)
    assert boxes.tolist() == [[[-4.0, -4.0, 12.0, 12.0]]]
    targets = Targets(
        boxes, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0.25]]).double(), torch.ones(1, 1).bool()
    )
    parts = DetectionLoss(1)(raw, boxes, logits.sigmoid(), targets)
    assert parts.classification.item() == pytest.approx(0.25 * 0.6931471805599453, rel=1e-6)  # normaliser is 1
    assert parts.iou.item() == pytest.approx(0.0, abs=1e-9)
    assert parts.distribution.item() == pytest.approx(0.0, abs=1e-9)


def test_generalized_iou_worked_example():
    """Unit squares one apart: no overlap, union 2, hull 3, GIoU = 0 - 1/3."""
    first, second = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]])
    torch.testing.assert_close(generalized_iou(first, second), torch.tensor([-1 / 3]))
    torch.testing.assert_close(generalized_iou(first, first), torch.tensor([1.0]))


def test_distribution_focal_loss_worked_example():
    """Uniform bins: every cross-entropy is ln 17, whatever the distance, also beyond the last bin."""
    loss = distribution_focal_loss(torch.zeros(2, 68), torch.tensor([[0.0, 1.5, 15.99, 40.0], [-3.0, 2.0, 3.3, 7.0]]))
    torch.testing.assert_close(loss, torch.full((2,), 17.0).log())


def test_distribution_focal_loss_is_least_where_the_mean_is_right():
    """With mass 0.7 on bin 2 and 0.3 on bin 3 the loss of distance 2.3 is the entropy."""
    probabilities = torch.full((1, 4, 17), 1e-30)
    probabilities[..., 2], probabilities[..., 3] = 0.7, 0.3
    logits = probabilities.log().reshape(1, 68)
    entropy = -(0.7 * torch.tensor(0.7).log() + 0.3 * torch.tensor(0.3).log())
    torch.testing.assert_close(distribution_focal_loss(logits, torch.full((1, 4), 2.3))[0], entropy)
    assert distribution_focal_loss(logits, torch.full((1, 4), 2.6)) > entropy


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"assigner": "nearest"}, "loss.assigner must be one of"),
        ({"classification": "softmax"}, "loss.classification must be one of"),
        ({"iou_weight": -1.0}, "loss.iou_weight must not be negative, got -1.0"),
        ({"distribution_weight": float("nan")}, "loss.distribution_weight must not be negative, got nan"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        DetectionLoss(2, **settings)


def test_labels_beyond_the_classes_are_refused(golden_case):
    tensors, targets = golden_case
    targets.labels[0, 0] = 5
    with pytest.raises(ValueError, match=r"from 0 to 4, got \d to 5"):
        DetectionLoss(5)(*_forward(tensors["logits"], tensors["reg_logits"]), targets)


def test_targets_move_to_another_device():
    moved = _empty_targets(1, 2).to("meta")
    assert {getattr(moved, field.name).device.type for field in fields(moved)} == {"meta"}


@pytest.fixture(scope="module")
def trained_forward(golden, small_network):
    """One float32 training-mode pass of S, as in the golden training step."""
    case = golden.tensors("train_s_b2_256x320")
    network = copy.deepcopy(small_network).train()
    decoded, raw = network(case["image"].to(torch.float32) / 255)
    return network, decoded, raw, case


def _targets_from_rows(rows: Tensor, batch: int) -> Targets:
    """Padded targets of (image, class, centre x, centre y, width, height) rows."""
    counts = [int((rows[:, 0] == image).sum()) for image in range(batch)]
    targets = _empty_targets(batch, max(counts))
    for image, count in enumerate(counts):
        of_image = rows[rows[:, 0] == image]
        targets.labels[image, :count] = of_image[:, 1].long()
        centre, size = of_image[:, 2:4], of_image[:, 4:6]
        targets.boxes_xyxy[image, :count] = torch.cat([centre - size / 2, centre + size / 2], 1)
        targets.weights[image, :count] = 1.0
        targets.mask[image, :count] = True
    return targets


@pytest.mark.parametrize("assigner, classification", VARIANTS)
def test_training_mode_loss_of_s_equals_golden(golden, trained_forward, assigner, classification):
    _, (boxes_xyxy, scores), raw, case = trained_forward
    targets = _targets_from_rows(case["targets"], 2)
    parts = DetectionLoss(80, assigner=assigner, classification=classification)(raw, boxes_xyxy, scores, targets)
    losses = golden.json("train_s_b2_256x320")["losses_float64_network"]
    _check_parts(parts, losses[f"{SHORT_NAMES[assigner]}_{classification}"], 3e-4)  # golden README


def test_training_step_of_s_equals_golden(golden, trained_forward):
    """Logits and running statistics; tolerances of the golden README."""
    network, _, raw, case = trained_forward
    step = int(case["anchor_step"])
    torch.testing.assert_close(raw.class_logits[:, ::step], case["cls_logits_head"], rtol=0, atol=5e-3)
    state = network.state_dict()
    prefix = "bn_after_one_step."
    statistics = [key for key in case if key.startswith(prefix)]
    assert len(statistics) == 12
    for key in statistics:
        torch.testing.assert_close(state[key.removeprefix(prefix)], case[key], rtol=0, atol=1e-4)


def test_gradients_of_s_equal_golden(golden, small_network):
    """The norms of 319 gradients, in float64 as the reference's network had them.

    In float32 they follow from the machine's kernels: one of them moves by up to 1.2 %, more than the golden README
    allows. The tolerance here is what the reference's own float32 loss moves them by, a fifth of the README's.
    """
    case, expected = golden.tensors("train_s_b2_256x320"), golden.json("train_s_b2_256x320")
    network = copy.deepcopy(small_network).double().train()
    (boxes_xyxy, scores), raw = network(case["image"].double() / 255)
    DetectionLoss(80)(raw, boxes_xyxy, scores, _targets_from_rows(case["targets"], 2)).total.backward()
    gradients = {name: parameter.grad.norm().item() for name, parameter in network.named_parameters()}
    norms, tolerance = expected["grad_l2_norms_tal_varifocal"], expected["grad_norm_float32_max_relative_deviation"]
    assert len(norms) == 319 and tolerance < 2e-3
    assert {name: gradients[name] for name in norms} == pytest.approx(norms, rel=tolerance)


def _loss_of_share(rank: int, world_size: int, port_file: str, inputs: tuple, results) -> None:
    """A process that sees every ``world_size``-th image and reports its loss and gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world_size)
    class_logits, box_logits, targets = inputs
    share = slice(rank, None, world_size)
    leaves = class_logits[share].clone().requires_grad_(), box_logits[share].clone().requires_grad_()
    targets = Targets(*(getattr(targets, field.name)[share] for field in fields(targets)))
    parts = DetectionLoss(5)(*_forward(*leaves), targets)
    parts.total.backward()
    results.put((rank, parts.total.item(), leaves[0].grad.numpy(), leaves[1].grad.numpy()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # starts two Python processes that import torch
def test_two_processes_equal_one(golden_case, tmp_path: Path):
    """Gradients averaged over processes, as DDP does, equal those of one process; so does the mean of the losses."""
    tensors, targets = golden_case
    class_logits, box_logits = _leaves({name: tensors[name].double() for name in ("logits", "reg_logits")})
    single = DetectionLoss(5)(*_forward(class_logits, box_logits), targets)
    single.total.backward()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    inputs = (class_logits.detach(), box_logits.detach(), targets)
    processes = [
        context.Process(target=_loss_of_share, args=(rank, 2, str(tmp_path / "rendezvous"), inputs, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    received = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sum(total for _, total, _, _ in received) / 2 == pytest.approx(single.total.item(), rel=1e-9)
    for rank, _, class_gradient, box_gradient in received:
        share = slice(rank, None, 2)
        torch.testing.assert_close(
            torch.from_numpy(class_gradient) / 2, class_logits.grad[share], rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(torch.from_numpy(box_gradient) / 2, box_logits.grad[share], rtol=1e-9, atol=1e-12)


def test_normaliser_is_at_least_one():
    assert global_normalizer(torch.tensor(0.25)).item() == 1.0
    assert global_normalizer(torch.tensor(7.5)).item() == 7.5


def test_pico_learns_one_image():
    """The whole path of gradient: thirty steps on one picture find its object."""
    network = model.build("pico", 2).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    images = torch.rand(2, 3, 64, 64) * 0.2
    images[:, 0, 16:48, 8:40] += 0.7
    box = torch.tensor([8.0, 16.0, 40.0, 48.0])
    targets = Targets(box.expand(2, 1, 4), torch.ones(2, 1).long(), torch.ones(2, 1), torch.ones(2, 1).bool())
    for _ in range(30):
        (boxes_xyxy, scores), raw = network(images)
        optimiser.zero_grad()
        DetectionLoss(2)(raw, boxes_xyxy, scores, targets).total.backward()
        optimiser.step()
    best = scores[0, :, 1].argmax()
    assert scores[0, best, 1] > 0.6  # 0.9 and more with other seeds; it starts at 0.01
    assert (boxes_xyxy[0, best] - box).abs().max() < 4.0  # pixels of a 32-pixel object; 0.5 to 1.7 with other seeds
