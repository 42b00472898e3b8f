"""Matching training trajectories, the baseline of its kind."""

from __future__ import annotations

from limbeck.methods.datasets.trajectory_base import TrajectoryMatching


class MTT(TrajectoryMatching):
    r"""Matching training trajectories: training on the synthetic images should end where training on the real ones did.

    Experts are trained on the real data with plain SGD; :math:`\theta^*_s` is one of them after epoch s. Every step draws an expert
    and s, starts from :math:`\hat\theta_0 = \theta^*_s`, takes T steps of gradient descent on augmented batches of the synthetic
    images with the step size :math:`\beta`,

    .. math:: \hat\theta_{i+1} = \hat\theta_i - \beta\,\nabla_\theta\,\mathrm{CE}\big(f_{\hat\theta_i}(a_i(S_{b_i})), y_{b_i}\big),

    and minimises the normalised distance to where the expert was M epochs later, for the images and :math:`\beta`:

    .. math:: L = \frac{\lVert\hat\theta_T - \theta^*_{s+M}\rVert_2^2}{\lVert\theta^*_s - \theta^*_{s+M}\rVert_2^2} .

    The loss has no unit, so the gradient of a pixel is small and ``lr_images`` large. A loss that stays above 1 means that T steps
    do not get as far as M epochs: raise ``inner_steps`` or ``step_size``, or lower ``segment``.

    Source: "Dataset Distillation by Matching Training Trajectories" (2022). Gradients are exact as published, but by the adjoint
    method, whose memory does not grow with T. The step size is kept above a thousandth of its initial value (our decision). The
    values of ``paper`` are those for CIFAR-10 with 10 images per class of the comparison in "Minimizing the Accumulated Trajectory
    Error to Improve Dataset Distillation" (2023).
    """

    name = "mtt"

    class Config(TrajectoryMatching.Config):
        presets = {
            "paper": {
                "ipc": 10,
                "steps": 5000,
                "lr_images": 100.0,
                "lr_step": 1e-5,
                "step_size": 0.001,
                "inner_steps": 30,
                "segment": 2,
                "max_start": 20,
                "expert_count": 100,
                "expert_epochs": 50,
                "expert_batch_size": 256,
                "expert_lr": 0.01,
                "zca": True,
                "diffaug": "color_crop_cutout_flip_scale_rotate",
                "bits": 16,
                "judge_networks": ("convnet-w128-d3",),
                "judge_seeds": 5,
                "judge_steps": 1000,
                "judge_batch_size": 256,
            }
        }
