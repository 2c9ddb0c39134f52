"""AdamW with what its precision needs: autocast, and for float16 a scaled loss."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from samray.config import TrainConfig
from samray.errors import ConfigError

INSTANCE_LEARNING_RATE = 1e-3  # peak, of the instance decoder: it starts far from its task
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Optimizer:
    """AdamW with groups: the image encoder, at a share of the learning rate, and the rest.

    The instance decoder is a group of its own, with its own learning rate, and its gradient is
    clipped apart: the model takes the same steps with it as without.

    Args:
        sam: the model; its parameters that need a gradient are trained.
        device: of the model.
        instances: the instance decoder, if one is trained.

    Raises:
        ConfigError: float16 on a CPU.
    """

    def __init__(
        self,
        sam: nn.Module,
        settings: TrainConfig,
        device: torch.device,
        instances: nn.Module | None = None,
    ) -> None:
        named = [(name, p) for name, p in sam.named_parameters() if p.requires_grad]
        encoder = [p for name, p in named if name.startswith("image_encoder.")]
        others = [p for name, p in named if not name.startswith("image_encoder.")]
        assert settings.learning_rate is not None
        apart = [] if instances is None else list(instances.parameters())
        groups = [
            {"params": others, "share": 1.0},
            {"params": encoder, "share": settings.encoder_lr_share},
            {"params": apart, "share": INSTANCE_LEARNING_RATE / settings.learning_rate},
        ]
        self.adamw = adamw(
            [group for group in groups if group["params"]],
            settings.learning_rate,
            settings.weight_decay,
            device,
        )
        self.parameters, self.apart = others + encoder, apart
        self.clip_grad_norm = settings.clip_grad_norm
        self.device, self.dtype = device, training_dtype(settings.precision, device.type)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self._scaler_before: dict[str, Any] | None = None  # before the scale of this step fell

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.adamw.param_groups:
            group["lr"] = group["share"] * rate

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.adamw.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        """Return a context that computes in the precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the parameters'."""
        self.scaler.scale(loss).backward()

    def step(self) -> Literal["done", "not finite", "loss scale lowered"]:
        """Change the parameters by their gradients, unless these are not finite.

        In float16 they may overflow because the loss is scaled too much: the scale is halved, and
        the caller computes them again. Where that does not help down to a scale of 1, they are not
        finite, and the scale is set back.
        """
        before = self.scaler.state_dict()
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad_norm)
        norm = norm + nn.utils.clip_grad_norm_(self.apart, self.clip_grad_norm).to(norm)
        if torch.isfinite(norm):  # of the reduced gradient, so every worker sees the same
            self.scaler.step(self.adamw)
            self.scaler.update()
            self._scaler_before = None
            return "done"
        self.scaler.update()
        if before and before["scale"] > 1:
            self._scaler_before = self._scaler_before or before
            return "loss scale lowered"
        if self._scaler_before is not None:
            self.scaler.load_state_dict(self._scaler_before)
            self._scaler_before = None
        return "not finite"

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from."""
        return {"adamw": self.adamw.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.adamw.load_state_dict(state["adamw"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def adamw(
    parameters: Any, learning_rate: float, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW as it is fastest on a device, for parameters or groups of them."""
    # On a CPU, torch's default is a loop over the parameters, which takes three times as long.
    fused = True if device.type == "cpu" else None
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, fused=fused)


def training_dtype(precision: str, device: str) -> torch.dtype:
    """Return the dtype of `train.precision` on cpu or cuda.

    Raises:
        ConfigError: float16 on a CPU.
    """
    if precision == "auto":
        if device == "cpu":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if precision == "float16" and device == "cpu":
        raise ConfigError(
            "train.precision: float16 needs a GPU, as few layers compute in it on a CPU; use "
            "bfloat16, float32 or auto"
        )
    return DTYPES[precision]
