"""What a run asks of a task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ml_collections import ConfigDict

from jaxdistill.methods.recipe import Kit, Stage
from jaxdistill.model import Weights
from jaxdistill.partition import Layout


@runtime_checkable
class Task(Protocol):
    """What is distilled. Making one checks its config and computes nothing heavy.

    Attributes:
      config: of the run.
      layout: the mesh and where arrays live on it.
      weights: how a trainable copy of its network is stored.
      abstract: shapes of the network's parameters, float32.
      ranks: the health numbers that are lower for a better student.
    """

    config: ConfigDict
    layout: Layout
    weights: Weights
    abstract: Any
    ranks: Sequence[str]

    def written(self) -> Any:
        """Its `Distillation` with nothing computed twice, whose programs are counted."""

    def kit(self, null: Any) -> Kit:
        """What it offers to a method, with this null conditioning (`given["null"]`)."""

    def frozen(self, tree: Any) -> Any:
        """Shapes of parameters as the teacher's are kept: in the teacher's dtype."""

    def null_shapes(self) -> Any:
        """Shapes of the null conditioning, {} where the network has it in itself."""

    def batch_shapes(self, stage: Stage) -> dict[str, Any]:
        """Shapes of a batch of this stage, with their places on the mesh."""

    def batches(self, stage: Stage, name: str) -> Callable[[int], Any]:
        """This process's rows of batch i of the stage: a function of (config.seed, name, i)."""

    def heads(self, stage: Stage) -> Any:
        """First parameters of the stage's discriminator."""

    def student(self, teacher: Any) -> Any:
        """Where a student (or a fake score) begins: its trainable weights, equal to the teacher."""

    def inside(self, tree: Any) -> Any:
        """Parameters inside a program as the networks use them (see `Layout.gathered`)."""


Numbers = Mapping[str, float]
