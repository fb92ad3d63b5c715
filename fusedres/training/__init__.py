"""Training: data, the loop, checkpoints and what is reported of them. Knows nothing of the command line."""

from fusedres.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fusedres.training.data import Data, DataError, open_data
from fusedres.training.history import History
from fusedres.training.loop import CHECKPOINT, Settings, TrainingDiverged, described_state, evaluate, fit
from fusedres.training.schedule import learning_rate

__all__ = [
    "CHECKPOINT",
    "CheckpointError",
    "Data",
    "DataError",
    "History",
    "Settings",
    "TrainingDiverged",
    "described_state",
    "evaluate",
    "fit",
    "learning_rate",
    "load_checkpoint",
    "open_data",
    "save_checkpoint",
]
