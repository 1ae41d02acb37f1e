"""The parameters that every training loop has; the sections of the training steps add their own to them."""

from __future__ import annotations

from pipeline_tasks.schema import Section, parameter


class TrainingParameters(Section):
    """Settings of one training loop."""

    epochs: int = parameter(50, "Passes over the training images", unit="epochs", ge=1, le=10000)
    budget_minutes: float | None = parameter(
        None, "Wall-clock budget; turned into optimiser steps once, after a measured warm-up; at most `epochs`",
        unit="minutes", gt=0,
    )  # fmt: skip
    batch_size: int = parameter(
        8, "Images of a batch, over all processes; an optimiser step learns from accumulate_steps batches",
        unit="images", ge=1, le=4096,
    )  # fmt: skip
    auto_batch_size: bool = parameter(
        False, "On GPUs use the largest power of two that fits in their memory instead of batch_size, tried out once; "
        "learning_rate stays as given",
    )  # fmt: skip
    accumulate_steps: int = parameter(
        1, "Batches whose gradients are joined into one optimiser step, as if they were one batch (batch norm apart)",
        unit="batches", ge=1, le=1024,
    )  # fmt: skip
    learning_rate: float = parameter(3e-3, "Peak learning rate of AdamW", gt=0, le=1)
    final_learning_rate_ratio: float = parameter(0.1, "Last learning rate over the peak (cosine)", gt=0, le=1)
    layer_decay: float = parameter(
        1.0, "Factor on the learning rate from heads to neck, to each backbone stage, to the stem, for fine-tuning "
        "(arXiv 1801.06146, section 3.2); tensors that start afresh keep the full rate; 1 is one rate for all",
        gt=0, le=1,
    )  # fmt: skip
    freeze: list[str] = parameter(
        [], "Layers that stay as they are, batch norm statistics included, as patterns of names such as "
        "backbone.stem or backbone.stage[12]",
    )  # fmt: skip
    weight_decay: float = parameter(1e-3, "AdamW weight decay of kernels", ge=0, le=1)
    warmup_steps: int = parameter(100, "Optimiser steps of linear warm-up", unit="steps", ge=0)
    ema_decay: float = parameter(0.998, "Decay of the exponential moving average of the weights", ge=0, lt=1)
    norm_momentum: float = parameter(
        0.1, "Share of a batch in the running statistics of the batch norms; 0.03 is published, for long trainings",
        gt=0, le=1,
    )  # fmt: skip
    gradient_clip_norm: float | None = parameter(10.0, "Gradients are scaled down to this norm; empty: never", gt=0)
    class_balance: float = parameter(
        0.0, "Share of images below which a class counts as rare: images with class c come sqrt(this / share of c) "
        "times as often (repeat factors, LVIS, arXiv 1908.03195), which lengthens an epoch; 0 is off",
        ge=0, le=1,
    )  # fmt: skip
    multi_scale: float = parameter(
        0.0, "Each batch has a random input size, a multiple of 32 within image_size × (1 ± this share) (YOLO9000, "
        "arXiv 1612.08242, section 2); the last close_mosaic_epochs have image_size; 0 is off",
        ge=0, le=0.5,
    )  # fmt: skip
    mosaic: float = parameter(0.0, "Probability of joining four images into one", ge=0, le=1)
    mixup: float = parameter(0.0, "Probability of blending two images", ge=0, le=1)
    flip: float = parameter(0.5, "Probability of a left-right flip (0 for text or digits)", ge=0, le=1)
    scale: float = parameter(0.3, "Random zoom: factor within 1 ± scale", ge=0, lt=1)
    translate: float = parameter(0.1, "Random shift as a share of the image side", ge=0, lt=1)
    rotate_degrees: float = parameter(0.0, "Random rotation within ± this angle", unit="degrees", ge=0, le=180)
    color_jitter: float = parameter(1.0, "Strength of hue, saturation and value jitter; 0 is none", ge=0, le=3)
    close_mosaic_epochs: int = parameter(5, "Last epochs without mosaic and mixup", unit="epochs", ge=0)
    evaluate_every_epochs: int = parameter(1, "Epochs between two evaluations on the validation split", ge=1)
    early_stop_epochs: int = parameter(
        0, "Evaluations in a row without a better mAP, from the first above 0 on, after which training ends; the "
        "learning rate still falls over `epochs`, so a stop forgoes its low end, where mAP often rises last: it saves "
        "time, it is no better recipe; 0 is never",
        unit="evaluations", ge=0,
    )  # fmt: skip
    checkpoint_every_steps: int = parameter(
        200, "Optimiser steps between two checkpoints", unit="steps", in_key=False, ge=1
    )
