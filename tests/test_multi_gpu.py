"""What experiments/full_size and experiments/flux_multi_gpu measure, on fake devices and the nano model."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from experiments import full_size, results
from experiments.flux_multi_gpu import gradients, run
from experiments.full_size import Bench, drawn
from solrl_jax import config, sharding
from solrl_jax.structs import leaves_by_path
from tests import nano


@pytest.fixture
def loads_nano(tmp_path, monkeypatch):
    """config.load gives the nano config with the same words."""
    monkeypatch.setattr(config, "load", lambda name, words: config.override(nano.build(tmp_path), **words))


def placed(tree, mesh):
    return drawn(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), sharding.specs_of(tree)))


@pytest.mark.slow
def test_drawn_in_parts(tmp_path):
    """A device draws its part alone, of the same numbers: at most 1/K and 3 % of the kernels' bytes lie on it."""
    base = full_size.shapes.read(nano.build(tmp_path), 1).frozen.base["single_transformer_blocks"]["attn"]
    mesh = sharding.make_mesh(4, 4)
    whole, parts = drawn(base), placed(base, mesh)
    cut = 0
    for (path, a), b in zip(leaves_by_path(whole).items(), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), path)
        spec = sharding.spec(path, a.ndim)
        assert b.sharding.is_equivalent_to(NamedSharding(mesh, spec), b.ndim), path
        share = b.addressable_shards[0].data.size / b.size
        assert share == (1 if spec == sharding.WHOLE else 1 / 4), path
        cut += share < 1
    assert cut == 3  # q, k, v
    with_temporaries = []
    for spec in (sharding.WHOLE, sharding.BY_INPUT):
        draw = full_size._draw(NamedSharding(mesh, spec))
        memory = draw.lower(jax.random.key(0), (8, 256, 256), np.dtype("float32"), 0.1).compile().memory_analysis()
        with_temporaries.append(memory.output_size_in_bytes + memory.temp_size_in_bytes)
    assert with_temporaries[1] < 0.3 * with_temporaries[0]


@pytest.mark.long
def test_every_measurement_on_four_devices(tmp_path):
    """Of a base over two of four devices; `written` gets every figure."""
    cfg = nano.build(tmp_path, shard=2)
    mesh, seen = sharding.make_mesh(4, cfg.shard), []
    bench = Bench(cfg, mesh, 1, written=lambda figures: seen.append(len(figures)))
    with jax.set_mesh(mesh):
        kernel = bench.frozen.base["transformer_blocks"]["attn"]["to_q"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / 2
        bench.encode()
        assert jax.tree.leaves(bench.prompts.cond)[0].addressable_shards[0].data.shape[0] == cfg.prompts // 4
        bench.forward("bf16", "2")
        bench.forward("nvfp4_emulated", "2")
        bench.decode("float32", 2)
        bench.reward(2)
        bench.micro_step("")
        bench.learn(1)
        bench.learn(2, deterministic=True)
        rows = bench.iterations({})
    assert len(rows) == 1 and set(rows[0]) == {"quantise", "explore", "regenerate", "learn"}
    medians = {name for name, figure in bench.figures.items() if not name.endswith((": compile", ": rate"))}
    assert {"iteration", *rows[0], "encode 4 prompts", "bf16 forward of 2", "nvfp4_emulated quantise"} <= medians
    again = {name: figure["value"] for name, figure in bench.figures.items() if name.endswith(": run again")}
    assert list(again.values()) == [0.0, 0.0] and "deterministic" in list(again)[1]
    assert seen[-1] == len(bench.figures) and len(seen) >= 12


def test_iterations_are_told_one_by_one(tmp_path, monkeypatch):
    """Three after a first one, from which the time of compiling is taken out; and what ran with which options."""
    options, told = [], []

    class Fake(full_size.Ahead):
        def __call__(self, *args):
            options.append(self.options)
            self.seconds = 0.5
            return self.jitted(*args)

    class Staged:
        def __init__(self):
            self.count, names = 0, ("merged", "quantised", "explore", "learn")
            self.jit = {name: lambda state: state for name in names}

        def __call__(self, state, frozen, prompts, times):
            self.count += 1
            times |= {"quantise": 3.0 + self.count, "explore": 1.0 * self.count, "learn": self.jit["learn"](2.0)}
            return state, {}

    class Held:
        repeat, first, frozen, prompts = 3, True, None, None
        state = staticmethod(dict)

    monkeypatch.setattr(full_size, "Ahead", Fake)
    rows, compiling = full_size.iterations(
        Staged(), Held(), options={"x": 1}, each=lambda rows, compiling: told.append(len(rows))
    )
    assert [row["explore"] for row in rows] == [2.0, 3.0, 4.0] and told == [1, 2, 3] and options == [{"x": 1}] * 4
    assert compiling == {"quantise": 0.0, "explore": 0.0, "learn": 0.5}
    Held.repeat, Held.first = 1, False
    (row,), _ = full_size.iterations(Staged(), Held())
    assert row == {"quantise": 4.0, "explore": 1.0, "learn": 1.5}


def test_the_peak_of_every_card(capsys):
    """The most of all, each beside it; where an earlier form had as much, the figure says so."""

    class Card:
        def __init__(self, gb):
            self.gb = gb

        def memory_stats(self):
            return {"peak_bytes_in_use": self.gb * 1e9}

    class Mesh:
        local_devices = (Card(23.0), Card(25.5))

    bench = Bench.__new__(Bench)
    bench.mesh, bench.before, bench.figures, bench.written = Mesh, [20.0, 25.0], {}, lambda figures: None
    bench.peak("a")
    bench.before = [23.0, 25.5]
    bench.peak("b")
    assert bench.figures["a"] == {
        "value": 25.5,
        "unit": "GB, the most of all cards [each]",
        "n": 2,
        "spread": [23.0, 25.5],
    }
    assert "at most" in bench.figures["b"]["unit"]


def test_the_peak_of_every_process(monkeypatch):
    """Of three processes of one or two cards; the first one's own figure gives way to that of all."""

    def peak(gb, before, *each):
        unit = "GB" + ", the most of all cards [each]" * (len(each) > 1) + ": at most, for as much was" * before
        return results.figure(gb, unit, len(each), list(each) if len(each) > 1 else None)

    others = [peak(25.5, False, 24.0, 25.5), peak(30.0001, True, 30.0001)]
    first, told = Bench.__new__(run.Together), []
    first.figures, first.written = {"learn": results.figure(3.0, "s", 1)}, lambda figures: told.append(dict(figures))
    monkeypatch.setattr(Bench, "peak", lambda self, name: self.figures.update({name: peak(23.0, False, 23.0)}))
    exchange = run.processes.exchanged
    for there, value, each in ((others[:1], 25.5, [23.0, 24.0, 25.5]), (others, 30.0001, [23.0, 24.0, 25.5, 30.0])):
        said = [json.dumps(other) for other in there]
        monkeypatch.setattr(run.processes, "exchanged", lambda text, reduce, said=said: reduce([text, *said]))
        first.peak("a")
        unit = "GB, the most of all cards [each]" + ": at most, for as much was" * (value == 30.0001)
        assert told[-1]["a"] == results.figure(value, unit, len(each), each) and told[-1]["learn"]["value"] == 3.0
    monkeypatch.setattr(run.processes, "exchanged", exchange)
    monkeypatch.setattr(Bench, "peak", lambda self, name: None)  # a CPU tells none
    first.peak("b")
    assert "b" not in first.figures and len(told) == 2


def measured(seconds):
    """run.measured that runs nothing: seconds of iterations by the name of the form; an error where there are none."""

    def measure(record, name, cfg, devices, repeat, options=None):
        asked.append((name, cfg.shard, cfg.prompts, devices, cfg.explore.chunk, cfg.learn.micro_batch, options))
        return [{"explore": s / 2, "learn": s / 2} for s in seconds.get(name, [])]

    asked = []
    return measure, asked


def test_efficiency_is_over_one_device(tmp_path, monkeypatch, loads_nano):
    measure, asked = measured({"1 devices": [10.0, 9.0, 12.0], "2 devices": [10.0] * 3, "4 devices": [12.5] * 3})
    monkeypatch.setattr(run, "measured", measure)
    run.main(["--part=scaling", "--devices=1,2,4", "--set=learn.micro_batch=2", f"--out={tmp_path / 's.json'}"])
    found = json.loads((tmp_path / "s.json").read_text())["figures"]
    assert [a[:4] for a in asked] == [(f"{n} devices", 1, n, n) for n in (1, 2, 4)]
    assert found["4 devices: prompts a second"]["value"] == 0.32
    assert found["2 devices: efficiency"]["value"] == 1.0
    assert found["4 devices: efficiency"]["value"] == pytest.approx(0.8)  # 0.08 a card and second, over 0.1
    assert found["4 devices: efficiency"]["spread"] == [0.72, 0.96] and found["4 devices: efficiency"]["n"] == 3


def test_a_base_in_parts_is_over_a_whole_one(tmp_path, monkeypatch, loads_nano):
    """At each setting; a form that failed has no ratio."""
    measure, asked = measured({"named, parts": [11.0], "named, whole": [10.0], "default, parts": [12.0]})
    monkeypatch.setattr(run, "measured", measure)
    words = ["--devices=4", "--shard=2", "--repeat=1", "--chunk=2", "--micro_batch=1", f"--out={tmp_path / 's.json'}"]
    run.main(["--part=shards", *words])
    found = json.loads((tmp_path / "s.json").read_text())
    assert [a[:6] for a in asked] == [
        ("named, parts", 2, 4, 4, 2, 1),
        ("named, whole", 1, 4, 4, 2, 1),
        ("default, parts", 2, 4, 4, 4, 2),
        ("default, whole", 1, 4, 4, 4, 2),
    ]
    names = [f"named, {stage}: parts over whole" for stage in ("iteration", "explore", "learn")]
    assert list(found["figures"]) == names and found["figures"][names[0]]["value"] == pytest.approx(1.1)
    assert found["named"]["learn.micro_batch"] == "1"
    measure, asked = measured({"named, parts": [10.0], "named, parts, pipelined": [9.0]})
    monkeypatch.setattr(run, "measured", measure)
    run.main(["--part=pipelined", "--settings=named", *words])
    assert [a[-1] for a in asked] == [None, run.PIPELINED]
    jax.jit(jax.lax.sin).lower(1.0).compile(run.PIPELINED)  # this version's XLA knows it
    found = json.loads((tmp_path / "s.json").read_text())["figures"]
    assert found["named, iteration: parts, pipelined over parts"]["value"] == 0.9


def test_a_form_that_runs_out_of_memory_is_recorded(tmp_path, monkeypatch, loads_nano):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 7 bytes")

    monkeypatch.setattr(run, "Bench", full)
    words = ["--settings=named", "--devices=2", "--shard=2", "--chunk=4", "--micro_batch=2"]
    run.main(["--part=shards", *words, f"--out={tmp_path / 's.json'}"])
    found = json.loads((tmp_path / "s.json").read_text())["figures"]
    assert list(found) == ["named, parts: failed", "named, whole: failed"]
    assert found["named, parts: failed"] | {"value": None, "n": 0} == found["named, parts: failed"]
    assert "RESOURCE_EXHAUSTED" in found["named, parts: failed"]["unit"]


def test_the_limit_of_a_cards_memory(tmp_path, monkeypatch, loads_nano, capsys):
    """A share of the card, below what is asked; refused where it does not hold, as on a CPU."""
    monkeypatch.setenv(run.FRACTION, "")
    run.limit(23.7, 85.0)
    share = float(run.os.environ[run.FRACTION])
    assert 23.68 < share * 85.0 <= 23.7
    assert run.parsed(["--part=shards", "--settings=named", "--limit=23.7"]).forms == ("parts",)
    assert run.parsed(["--part=shards", "--settings=named", "--limit=23.7"]).out.name == "shards_named_limited.json"
    with pytest.raises(SystemExit, match=r"--limit=23.7: the allocators' limits are \[\] GB"):
        run.main(["--part=shards", "--limit=23.7", "--card_gb=85", f"--out={tmp_path / 's.json'}"])
    for word in ("--part=shards --devices=1,2", "--settings=mine", "--part=pipelined --forms=half"):
        with pytest.raises(SystemExit):
            run.main([*word.split(), f"--out={tmp_path / 's.json'}"])
    assert "takes one number of cards" in capsys.readouterr().err


def test_the_cases_of_a_gradient(tmp_path, monkeypatch, loads_nano):
    """Each against one device's of its dtype, bfloat16's also against float32's; run twice where that is the case."""
    asked = []

    def made(cfg, case, count, runs):
        asked.append((cfg.model.dtype, cfg.learn.micro_batch, cfg.learn.deterministic, runs, *case))
        assert count == 2
        assert cfg.prompts == 4 and cfg.shard == case.shard and cfg.learn.reference_every == 1
        bias = 10.0 + (cfg.model.dtype == "bfloat16") + case.devices / 10 + (case.micro == 4) / 2
        return [{"a": np.array([bias + i])} for i in range(runs)]

    monkeypatch.setattr(gradients, "gradient", made)
    words = ["--part=gradients", "--devices=1,2,4", "--other=xla_a=1", "--micro=2", "--other_micro=4", "--layers=0"]
    run.main([*words, f"--out={tmp_path / 'g.json'}"])
    found = {k: f["value"] for k, f in json.loads((tmp_path / "g.json").read_text())["figures"].items()}
    first = asked[: len(asked) // 2]
    assert [case[4:6] for case in first] == [(1, 1), (1, 1), (4, 1), (4, 4), (2, 1), (1, 1), (1, 1), (4, 1)]
    assert [case[1] for case in first] == [2, 2, 2, 2, 2, 2, 4, 4] and len(asked) == 16
    assert [case[3] for case in first] == [2, 2, 1, 1, 1, 1, 1, 1] and first[5][7] == {"xla_a": "1"}
    assert [case[8] for case in first] == [False, True, *[False] * 6] == [case[2] for case in first]
    assert found["float32: |g|"] == 10.1 and found["float32: 4 devices, shard=4"] == pytest.approx(0.3 / 10.1)
    assert found["float32: 4 devices, micro_batch=4 on both"] == pytest.approx(0.3 / 10.6)
    assert found["bfloat16: against float32"] == pytest.approx(1 / 10.1)
    assert found["bfloat16: 2 devices"] == pytest.approx(0.1 / 11.1)
    assert found["bfloat16: run again"] == found["bfloat16: deterministic, run again"] == pytest.approx(1 / 11.1)
    assert found["bfloat16: deterministic"] == 0


def test_difference_is_relative_over_all_leaves():
    one, other = ({"a": np.array([3.0, 0.0]), "b": np.array(x)} for x in (4.0, 5.0))
    assert gradients.difference(other, one)["value"] == 1 / 5


@pytest.mark.slow
def test_both_dtypes_compute_the_same_network(tmp_path):
    """The float32 base and texts are bfloat16's numbers."""
    mesh = sharding.make_mesh(1)
    with jax.set_mesh(mesh):
        made = [
            gradients.network(config.override(nano.build(tmp_path), **{"model.dtype": t}), mesh)[1:]
            for t in ("bfloat16", "float32")
        ]
    for a, b in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
