"""What experiments/flux_eight tells of the seconds of its forms."""

import pytest

from experiments.flux_eight import run


def seconds(explore, learn):
    return {"quantise": 1.0, "explore": explore, "regenerate": 2.0, "learn": learn}


def test_figures_of_forms():
    """Eight cards that take 12.5 s for what one takes 10 s for are at .8; all but learning is the rollout."""
    found = {"branch, one card": [seconds(4.0, 3.0)], "branch": [seconds(6.0, 3.5)], "sol_rl": [seconds(12.0, 5.0)]}
    figures = run.figures_of(found, {"branch, one card": 6, "branch": 48, "sol_rl": 48}, 8)
    assert figures["branch: prompts a second"]["value"] == 48 / 12.5 and figures["branch: rollout"]["value"] == 9
    assert figures["branch: efficiency"]["value"] == pytest.approx(0.8)
    assert figures["sol_rl: rollout"]["value"] == 15 and "sol_rl: efficiency" not in figures


def test_the_recipes_share_out_the_papers_prompts():
    """Of every form the config on eight cards: 48 prompts, 6 a card, of 96 candidates of which 24 are kept."""
    for name, form in run.FORMS.items():
        cfg = run.config_of(form, "flux", 48, 8, {})
        assert (cfg.prompts, cfg.candidates, cfg.kept) == (48 if form.all_cards else 6, 96, 24), name
        assert cfg.shard == (8 if form.in_parts else 1)
    with pytest.raises(SystemExit, match="--prompts=50: 8 cards do not divide them"):
        run.config_of(run.FORMS["branch"], "flux", 50, 8, {})


def test_a_process_has_one_card(monkeypatch):
    """Its own card, or on a CPU one device, with the other flags as they were."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
    assert run.of_card(3) == {"CUDA_VISIBLE_DEVICES": "3", "XLA_FLAGS": "--xla_a=1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert run.of_card(3)["CUDA_VISIBLE_DEVICES"] == "7"


def test_arguments(capsys):
    args = run.parsed(["--process=1,8,host:1"])
    assert "branch, one card" not in args.forms and args.out.name == "flux_processes.json"
    assert run.parsed(["--config=sana", "--forms=branch; sol_rl"]).forms == ["branch", "sol_rl"]
    with pytest.raises(SystemExit):
        run.parsed(["--processes=8", "--forms=branch, one card"])
    assert "branch, one card unknown, take branch, base over the cards; branch; sol_rl" in capsys.readouterr().err
