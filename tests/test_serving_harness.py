"""lm-evaluation-harness asks the running server; what it gets is what `forward` says in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flask")
pytest.importorskip("waitress")
pytest.importorskip("prometheus_client")

from served import CONFIG, PARAMS, TEXT, TOKENIZER, listening, serving

from functional_lm import folder
from functional_lm.model import transformer

WORDS = TEXT.split()
ROWS = [
    {
        "question": " ".join(WORDS[i : i + 3 + 4 * i]),
        "choices": [" ".join(WORDS[j : j + 2]) for j in (i, i + 3, i + 5)],
        "answer": i % 3,
    }
    for i in range(5)
]


def likelihood(context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, and whether it is what greedy decoding says: from the full forward."""
    before, after = TOKENIZER.encode(context), TOKENIZER.encode(continuation)
    ids = torch.tensor([[*before, *after]])
    likely = torch.log_softmax(transformer.forward(PARAMS, ids, CONFIG)[0], -1)[len(before) - 1 : -1]
    chosen = likely.gather(-1, torch.tensor(after)[:, None])
    return float(chosen.sum()), bool((likely.argmax(-1) == torch.tensor(after)).all())


@pytest.mark.long
def test_its_likelihoods_are_those_of_the_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harness = pytest.importorskip("lm_eval")
    folder.save(tmp_path / "fox", PARAMS, CONFIG, TOKENIZER)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    own: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choosing = {**own, "task": "choosing", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    choosing |= {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    continuing = {**own, "task": "continuing", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    continuing |= {
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    with serving() as service, listening(service) as url:
        found = harness.simple_evaluate(
            model="local-completions",
            model_args={
                "base_url": f"{url}/v1/completions",
                "model": "fox",
                "tokenizer_backend": "huggingface",
                "tokenizer": str(tmp_path / "fox"),
                "max_length": CONFIG.max_len,
                "num_concurrent": 1,
            },
            tasks=[choosing, continuing],
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = found["samples"]["choosing"]
    assert len(samples) == len(ROWS)
    for sample in samples:
        expected = [likelihood(ROWS[sample["doc_id"]]["question"], f" {text}") for text in sample["doc"]["choices"]]
        got = [(float(one[0][0]), one[0][1] in (True, "True")) for one in sample["resps"]]
        assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-3)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        best = max(range(3), key=lambda i: expected[i][0])
        assert sample["acc"] == float(best == sample["doc"]["answer"])
    from served import offline

    for sample in found["samples"]["continuing"]:
        said = offline(sample["doc"]["question"], 8).split("\n")[0]
        assert sample["resps"][0][0] == said
