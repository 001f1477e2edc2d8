"""Writes a job: skewed clients out of the packaged ICD-10-CM texts, base model, first adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import tomli_w
from safetensors.numpy import save_file

from fedtune.adapter.lora import LoRA, attach_lora
from fedtune.base.classifier import BaseModel
from fedtune.base.resolve import resolve_base
from fedtune.data import PartitionSpec, load_icd10
from peers.job import ALPHA, MAX_TOKENS, RANK, TARGETS, Job, write_job

BASE = "all-MiniLM-L6-v2"
SKEW = 0.3  # Dirichlet concentration of a client's labels
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def prepare(job: Job) -> None:
    """Fill the job's folder; the number of labels is known only now."""
    job = replace(job, labels=_write_clients(job))
    write_job(job)
    _write_base(job)
    _write_initial(job)
    job.federation.write_text(federation(job))


def _write_clients(job: Job) -> int:
    """Each client draws its texts by label shares of its own; clients may hold the same text."""
    whole = load_icd10(partition=PartitionSpec.parse("iid"), clients=1, seed=job.seed)
    texts, labels = whole.clients[0].train.texts, whole.clients[0].train.labels
    rng = np.random.default_rng(job.seed)
    per_label = np.bincount(labels)
    for number in range(job.clients):
        shares = rng.dirichlet(np.full(len(per_label), SKEW))
        size = max(job.batch_size, int(rng.integers(job.rows // 2, job.rows * 3 // 2 + 1)))
        rows = rng.choice(len(texts), size, p=(shares / per_label)[labels])
        folder = job.data / f"client-{number:05}"
        folder.mkdir(parents=True)
        lines = [json.dumps({"text": texts[row], "label": str(labels[row])}) for row in rows]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(per_label)


def _write_base(job: Job) -> None:
    """The packaged model with dropout switched off, so that every path computes the same."""
    source = resolve_base(BASE)
    job.base.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (job.base / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (job.base / "config.json").write_text(json.dumps(config | NO_DROPOUT))


def _write_initial(job: Job) -> None:
    lora = LoRA(RANK, ALPHA, targets=TARGETS, also_train=("classifier",))
    attached = attach_lora(BaseModel(str(job.base)).classifier(job.labels), lora, job.seed)
    state = attached.manifest.split(attached.read())
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, job.initial)


def federation(job: Job) -> str:
    """The job as fedtune's configuration file."""
    drawn = {"clients-per-round": job.clients_per_round} if job.clients_per_round else {}
    return tomli_w.dumps(
        {
            "seed": job.seed,
            "base": {"path": str(job.base), "max-length": MAX_TOKENS},
            "adapter": {"rank": RANK, "alpha": float(ALPHA), "targets": list(TARGETS)},
            "data": {
                "source": str(job.data),
                "labels": [str(label) for label in range(job.labels)],
            },
            "train": {
                "steps": job.steps,
                "batch-size": job.batch_size,
                "lr": job.lr,
                "schedule": "constant",
            },
            "rounds": {"count": job.rounds, "evaluate-every": 0, **drawn},
        }
    )
