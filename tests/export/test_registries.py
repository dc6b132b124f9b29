"""Model, training, export and runtime each have a registry of drafters."""

from dynamo_export.registry import EXPORTS
from dynamo_model import DRAFTERS
from dynamo_runtime import registry as runtime
from dynamo_runtime.lookup import Lookup
from dynamo_runtime.topology import Plain
from dynamo_train import registry as training


def test_every_room_knows_the_same_drafters() -> None:
    """What can be put on a base can be trained, exported and decoded, under one name."""
    made = {name: command.load() for name, command in training.DRAFTERS.items()}
    assert {name: drafter.model.command for name, drafter in made.items()} == {name: name for name in made}
    assert [drafter.model for drafter in made.values()] == [*DRAFTERS.values()]
    assert [*DRAFTERS, Lookup.name] == [*runtime.DRAFTERS], "the text is a drafter that nobody trains"
    assert [Plain.kind, *DRAFTERS] == [*EXPORTS] == [*runtime.TOPOLOGIES]
    for kinds in (DRAFTERS, EXPORTS, runtime.TOPOLOGIES):
        assert [*kinds] == [each.kind for each in kinds.values()]
    for kind, model in DRAFTERS.items():
        assert [*model.sizes] == [*runtime.TOPOLOGIES[kind].least], "a checkpoint and a manifest give the same numbers"
