"""Methods inside a 🤗 transformers ``Trainer``: its loop, data collation, callbacks and checkpoints; our loss.

::

    method = KD(student, teacher, temperature=2)
    DistillationTrainer(method, args=TrainingArguments("out"), train_dataset=data).train()
    student.save_pretrained("small")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from limbeck.core.batch import Batch, call_model
from limbeck.core.errors import InputError
from limbeck.core.method import Method


class DistillationTrainer(Trainer):
    """A ``Trainer`` whose model is the method's student and whose loss is the method's.

    Args:
        method: any method with a ``student`` whose stages are plain gradient steps. Its other trainable parts (projectors,
            heads, online teachers) are put into the same optimiser; its frozen parts move to the trainer's device.
        options: everything that ``Trainer`` takes, except ``model``.

    Raises:
        InputError: the method has no student.
    """

    def __init__(self, method: Method, **options: Any) -> None:
        student = getattr(method, "student", None)
        if not isinstance(student, nn.Module):
            raise InputError(f"{type(method).__name__} has no student to train")
        self.method = method
        super().__init__(model=student, **options)
        # The trainer must not hand "number of items in the batch" to a loss that is a mean already.
        self.model_accepts_loss_kwargs = False
        method.to(self.args.device)
        method.train()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's own optimiser, with a further group for what the method trains besides the student."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        own: Any = self.model
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        student = {id(p) for p in own.parameters()}
        extra = [p for p in self.method.trainable_parameters() if id(p) not in known and id(p) not in student]
        if extra:
            optimizer.add_param_group({"params": extra})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's total loss; its terms go to the trainer's log at every logging step."""
        losses = self.method.losses(Batch.of(inputs))
        if self.state.global_step % max(1, int(self.args.logging_steps)) == 0 and model.training:
            self.log({name: float(value.detach()) for name, value in losses.items()})
        if not return_outputs:
            return losses.total
        rest = {k: v for k, v in inputs.items() if k not in ("labels", "label", "index")}
        outputs = call_model(model, rest)
        return losses.total, outputs if isinstance(outputs, dict) else {"logits": outputs}
