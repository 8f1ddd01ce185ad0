"""The cost of small networks: what the table and the files say."""

import json

from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._profile.step import Timed
from kfqn_optax.bench._quick import quick_jit


def test_scale_of_width_and_of_devices(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Timed, "jit", staticmethod(quick_jit))
    words = ["--axes", "width", "devices", "--methods", "kfqn", "--steps", "1", "--quick"]
    assert main(["scale", *words, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "width (depth" in output
    assert "devices (width" in output
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    costs = json.loads((tmp_path / "scale.json").read_text())["costs"]
    found = {(cost["axis"], cost["value"], cost["method"]): cost for cost in costs}
    assert list(found) == [
        *(("width", width, method) for width in (8, 16) for method in ("adam", "kfqn")),
        *(("devices", 2, method) for method in ("adam", "kfac")),
    ]
    assert found["width", 16, "kfqn"]["gflop"] > found["width", 8, "kfqn"]["gflop"]
    assert all(cost["seconds"] > 0 and cost["state_mb"] > 0 for cost in costs)
