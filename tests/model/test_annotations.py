"""The shapes in the signatures are true: the package's main paths run with every annotation checked."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECKED_RUN = """
from jaxtyping import install_import_hook

install_import_hook("model", "beartype.beartype")  # checks arguments and results of everything imported from here on

import numpy as np
import torch

import model
from model.boxes import postprocess
from model.distillation import DistillationConfig, DistillationLoss, FeatureAdapters
from model.loss import DetectionLoss, Targets
from model.preprocessing import Preprocessing
from model.teacher import Teacher

image, letterbox = Preprocessing(64).apply(np.zeros((40, 50, 3), dtype=np.uint8))
images = torch.from_numpy(image)[None].float() / 255
network = model.build("pico", 3).eval()
(boxes_xyxy, scores), raw = network(images)
labels = torch.zeros(1, 2, dtype=torch.int64)
targets = Targets(torch.rand(1, 2, 4).cumsum(-1) * 20, labels, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
for assigner in ("task_aligned", "atss"):
    DetectionLoss(3, assigner=assigner)(raw, boxes_xyxy, scores, targets).total.backward(retain_graph=True)
widths = [level.shape[1] for level in raw.features]
(_, teacher_scores), teacher_raw = Teacher([network, network])(images)
for kind in ("pkd", "pkd_foreground", "cwd"):
    config = DistillationConfig(feature_weight=1.0, feature_kind=kind)
    terms = DistillationLoss(config, FeatureAdapters(widths, widths))(raw, teacher_raw, teacher_scores)
detections = postprocess(
    boxes_xyxy[0].detach().numpy(), scores[0].detach().numpy(), score_threshold=0.0, iou_threshold=1.0
)
letterbox.to_original(detections[:, :4])
network.fuse()(images)
try:
    network(images[0])
except Exception as error:
    print(len(terms), len(detections), type(error).__name__)
"""


@pytest.mark.slow  # a fresh interpreter imports torch with the checks in place
def test_main_paths_keep_their_annotations(repository):
    command = [sys.executable, "-c", CHECKED_RUN]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["3", "252", "TypeCheckError"]  # 84 anchors, 3 classes; a wrong rank is caught
