"""metrics.jsonl, TensorBoard and the screen."""

import json
import math
import sys
import types

import pytest

from solrl_jax.run import guards, log


def write_some(run, iterations, done=0):
    with log.open_log(run, done, 10, "shapes") as out:
        for i in iterations:
            out.write(i, {"reward/mean": 0.1 * i, "time/iteration": 2.0, "time/learn": 1.5})


def test_lines_are_json_and_not_finite_is_null(tmp_path):
    with log.open_log(tmp_path, 0, 3, "shapes") as out:
        out.write(1, {"reward/mean": math.nan, "loss": 0.1, "big": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"iteration": 1, "reward/mean": null, "loss": 0.1, "big": null}\n'


def test_resumed_lines_past_the_restored_iteration_are_dropped(tmp_path):
    write_some(tmp_path, range(6))
    file = tmp_path / "metrics.jsonl"
    before = file.read_text().splitlines()
    file.write_text("\n".join(before) + '\n{"iteration": 6, "rew')  # as after a crash
    write_some(tmp_path, [4, 5], done=3)
    after = file.read_text().splitlines()
    assert after == before  # dropped and written again; kept lines are unchanged
    assert [json.loads(line)["iteration"] for line in after] == list(range(6))


def test_damaged_lines_are_dropped(tmp_path):
    write_some(tmp_path, range(3))
    file = tmp_path / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b'\xff\xfe\0\n{"iteration": null}\n{"iteration": "3"}\n' + b"[" * 100_000 + b"\n")
    assert [line["iteration"] for line in log.read(file)] == [0, 1, 2]
    write_some(tmp_path, [], done=2)
    assert file.read_bytes() == before


def test_tensorboard_holds_the_finite_scalars(tmp_path):
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401 - the writer's own format, read back below
    from tensorboardX.proto.event_pb2 import Event

    with log.open_log(tmp_path, 0, 2) as out:
        out.write(1, {"reward/mean": 0.5, "loss": math.nan})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), {}
    while content:  # records: length u64, crc u32, event, crc u32
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        content = content[16 + size :]
    assert found == {"reward/mean": (1, 0.5)}


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    with log.open_log(tmp_path, 0, 4, "shapes") as out:
        out.say("hello")
        out.write(0, {"eval_reward_shapes": 0.5, "eval_reward_clipscore": 0.25})
        out.between("explore", 0.5)
        for i in (1, 2, 3):
            out.write(i, {"reward/mean": 0.3, "time/iteration": 40.0, "time/explore": 30.0, "time/select": 0.01})
    assert capsys.readouterr().out.splitlines() == [
        "hello",
        "base model: shapes 0.5000  clipscore 0.2500",
        "iteration 1/4  reward 0.3000  shapes 0.5000  explore 30.0s",
        "iteration 2/4  reward 0.3000  shapes 0.5000  ETA 1m20s  explore 30.0s",
        "iteration 3/4  reward 0.3000  shapes 0.5000  ETA 40s  explore 30.0s",
    ]


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with log.open_log(tmp_path, 2, 4, "shapes") as out:
        out.between("explore", 0.5)
        out.between("regenerate", 1.0)
        out.write(3, {"reward/mean": 0.3})
    shown = capsys.readouterr().err
    assert "2/4" in shown and "3/4, reward 0.3000" in shown


def test_sinks_are_closed_when_a_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), log.open_log(tmp_path, 0, 4) as out:
        out.write(1, {"loss": 1.0})
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="closed file"):
        out.write(2, {"loss": 1.0})
    assert len(log.read(tmp_path / "metrics.jsonl")) == 1


class FakeWandb(types.ModuleType):
    """A stand-in for the parts of wandb that `log.wandb` uses; `calls` records the calls."""

    class Error(Exception):
        pass

    def __init__(self, refuses=""):
        super().__init__("wandb")
        self.calls, self.refuses = [], refuses

    def init(self, **given):
        if self.refuses:
            raise self.Error(self.refuses)
        self.calls.append(("init", given))
        return self

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.calls.append(("finish", kind))

    def define_metric(self, name, step_metric):
        self.calls.append(("axis", name, step_metric))

    def log(self, metrics):
        self.calls.append(("log", metrics))


def test_wandb_gets_the_finite_numbers_and_a_resumed_run_goes_on_in_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for done in (0, 2):
        with log.open_log(tmp_path, done, 4, also=(log.wandb(tmp_path, "team/flow", {"seed": 42}),)) as out:
            out.write(done + 1, {"loss": 0.5, "bad": math.nan})
    first, second = (given for kind, *rest in fake.calls if kind == "init" for given in rest)
    assert first == second and first["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["entity"], first["project"], first["name"]) == ("team", "flow", tmp_path.name)
    assert first["config"] == {"seed": 42} and first["resume"] == "allow"
    assert [call[1] for call in fake.calls if call[0] == "log"] == [
        {"iteration": 1, "loss": 0.5},
        {"iteration": 3, "loss": 0.5},
    ]
    assert fake.calls.count(("axis", "*", "iteration")) == fake.calls.count(("finish", None)) == 2


def test_wandb_that_lets_nobody_in(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key"))
    with (
        pytest.raises(log.LogError, match="wandb=flow: no API key; log in by `wandb login`, or set WANDB_MODE=offline"),
        log.wandb(tmp_path, "flow", {}),
    ):
        pass


@pytest.mark.parametrize("content", ["", "{}", "[]", "[" * 100_000], ids=len)
def test_wandb_whose_id_is_damaged(tmp_path, monkeypatch, content):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    (tmp_path / "wandb.json").write_text(content)
    with pytest.raises(log.LogError, match=r"wandb\.json has no id of a wandb run.*remove it"):
        log.wandb(tmp_path, "flow", {}).__enter__()


@pytest.mark.parametrize(("seconds", "text"), [(45.4, "45s"), (59.7, "1m00s"), (200.0, "3m20s"), (7500.0, "2h05m")])
def test_duration(seconds, text):
    assert log.duration(seconds) == text


def lines(trained, held_out, name="eval_reward_shapes"):
    rows = zip(trained, held_out, strict=True)
    return [{"iteration": 20 * i, "eval_reward_avg": a, name: b} for i, (a, b) in enumerate(rows)]


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_told():
    (said,) = guards.exploited([*lines([0.1, 0.9, 0.3], [0.5, 0.9, 0.25]), {"iteration": 41}], {"shapes": 1.0})
    assert said.startswith("warning: from iteration 0 to 40 the trained reward rose by 0.2 (0.1 to 0.3) while shapes, ")
    assert "held out, fell by 0.25 (0.5 to 0.25)" in said and "\n" not in said


@pytest.mark.parametrize(
    ("trained", "held_out", "weight"),
    [
        ([0.1, 0.3], [0.5, 0.6], 1.0),  # both rise
        ([0.3, 0.1], [0.5, 0.2], 1.0),  # both fall
        ([0.1, 0.3], [0.5, 0.5], 1.0),
        ([0.1, 0.3], [0.5, 0.2], -1.0),  # lower is better
        ([0.1, 0.3], [0.5, None], 1.0),  # not finite
        ([0.1], [0.5], 1.0),
        ([], [], 1.0),
    ],
)
def test_nothing_is_told_where_nothing_is_wrong(trained, held_out, weight):
    assert guards.exploited(lines(trained, held_out), {"shapes": weight}) == []


def test_a_change_within_its_noise_is_not_told():
    """Within two standard errors of the gain: the held-out reward falls by .25, the trained one rises by .2."""
    for errors, told in (((0.09, 0.12), 1), ((0.09, 0.13), 0), ((0.11, 0.12), 0)):
        found = lines([0.1, 0.3], [0.5, 0.25])
        found[-1] |= dict(zip(("eval_gain_error/avg", "eval_gain_error/shapes"), errors, strict=True))
        assert len(guards.exploited(found, {"shapes": 1.0})) == told


def test_a_held_out_reward_of_negative_weight_is_better_the_lower_it_is():
    (said,) = guards.exploited(lines([0.1, 0.3], [0.5, 0.7]), {"shapes": -0.5})
    assert "shapes, held out, rose by 0.2 (0.5 to 0.7)" in said
