"""What a run has measured so far: every step's loss and right answers, and a row for each epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

#: The columns of an epoch's row, in the order of the CSV file.
COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "images_per_s",
)


@dataclass
class History:
    """Part of each checkpoint, so that the record of a resumed run has no gap."""

    loss: list[float] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    epoch_seconds: float = 0.0  # spent on the epoch that is not closed yet

    @classmethod
    def of(cls, state: dict[str, Any]) -> History:
        return cls(**state)

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def add_steps(self, loss: list[float], correct: list[int], seconds: float) -> None:
        self.loss += loss
        self.correct += correct
        self.epoch_seconds += seconds

    def close_epoch(self, steps: int, pictures: int, lr: float, test_loss: float, test_accuracy: float) -> None:
        """Add the row of the epoch that the last ``steps`` steps, over ``pictures`` pictures, make up."""
        row = {
            "epoch": len(self.epochs) + 1,
            "step": len(self.loss),
            "lr": lr,
            "train_loss": sum(self.loss[-steps:]) / steps,
            "train_accuracy": sum(self.correct[-steps:]) / pictures,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": self.epoch_seconds,
            "images_per_s": pictures / self.epoch_seconds,
        }
        self.epochs.append(row)
        self.epoch_seconds = 0.0
