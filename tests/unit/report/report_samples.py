"""A realistic run for the tests of the reports: 8 hospitals, 21 ICD-10 chapters, 10 rounds."""

from __future__ import annotations

import numpy as np

from fedtune.records import ClientSummary, Reference, RoundRecord, Score, Summary

CHAPTERS = (
    "Infectious diseases",
    "Neoplasms",
    "Blood and immune mechanism",
    "Endocrine, nutritional and metabolic",
    "Mental and behavioural",
    "Nervous system",
    "Eye and adnexa",
    "Ear and mastoid process",
    "Circulatory system",
    "Respiratory system",
    "Digestive system",
    "Skin and subcutaneous tissue",
    "Musculoskeletal system",
    "Genitourinary system",
    "Pregnancy and childbirth",
    "Perinatal conditions",
    "Congenital malformations",
    "Symptoms and abnormal findings",
    "Injury and poisoning",
    "External causes",
    "Factors influencing health status",
)
ACCURACIES = (0.412, 0.503, 0.561, 0.598, 0.621, 0.64, 0.655, 0.668, 0.676, 0.681)
REFERENCES = (
    Reference("centralized", 0.725, 1.012, 152.2, 38_400),
    Reference("local-only", 0.366, 2.31, 148.9, 38_400),
    Reference("linear-head", 0.587, 1.52, 9.1, 38_400),
)


def sample_rounds(count: int = 10) -> list[RoundRecord]:
    """The first `count` of ten rounds; hospital-3 fails in the fourth."""
    names = tuple(f"hospital-{n}" for n in range(1, 9))
    rounds = []
    for number in range(1, count + 1):
        failed = {"hospital-3": "out of memory"} if number == 4 else {}
        counted = tuple(name for name in names if name not in failed)
        rounds.append(
            RoundRecord(
                round=number,
                train_loss=2.9 / (1 + 0.25 * number),
                loss=2.6 / (1 + 0.16 * number),
                accuracy=ACCURACIES[number - 1],
                clients=counted,
                failed=failed,
                bytes_up=len(counted) * 396_544,
                bytes_down=8 * 396_544,
                seconds=15.4,
                train_seconds=14.2,
            )
        )
    return rounds


def sample_clients(count: int = 8, references: bool = True) -> tuple[ClientSummary, ...]:
    """`count` hospitals of different sizes and case mixes."""
    rng = np.random.default_rng(7)
    clients = []
    for number in range(1, count + 1):
        shares = rng.dirichlet(np.full(len(CHAPTERS), 0.4))
        counts = rng.multinomial(int(rng.integers(200, 900)), shares)
        alone = 0.27 + 0.20 * (number - 1) / max(count - 1, 1)
        clients.append(
            ClientSummary(
                name=f"hospital-{number}",
                examples=int(counts.sum()),
                label_counts=tuple(int(n) for n in counts),
                rounds_completed=9 if number == 3 else 10,
                rounds_failed=1 if number == 3 else 0,
                accuracy=0.681,
                own_mix_accuracy=0.66 + 0.015 * (number % 5),
                local_accuracy=alone if references else None,
                local_own_mix_accuracy=alone + 0.25 - 0.02 * (number % 3) if references else None,
            )
        )
    return tuple(clients)


def sample_summary(clients: int = 8, references: bool = True) -> Summary:
    """A finished run."""
    rounds = sample_rounds()
    return Summary(
        name="icd10-8-hospitals",
        status="finished",
        rounds=10,
        planned_rounds=10,
        seed=1,
        final=Score(10, 1.0, 0.681),
        best=Score(10, 1.0, 0.681),
        labels=CHAPTERS,
        per_client=sample_clients(clients, references),
        references=REFERENCES if references else (),
        bytes_up_per_client_round=396_544,
        bytes_down_per_client_round=396_544,
        bytes_up=sum(r.bytes_up for r in rounds),
        bytes_down=sum(r.bytes_down for r in rounds),
        seconds=168.3,
        train_seconds=142.0,
        peak_rss_mb=1_234.5,
        masked=True,
        epsilon=None,
        epsilon_unit="none",
        config_digest="c0ffee" * 10 + "0123",
        base="MiniLM-L6-v2, 22.7 M parameters (packaged)",
        base_digest="5eed" * 16,
        adapter="LoRA r=8 on query, value + classifier",
        adapter_parameters=98_709,
        data="ICD-10-CM descriptions as clinical text, by Dirichlet(0.4) over 21 chapters",
        evaluation="1,021 texts of common test set",
        warnings=("hospital-3 failed in round 4: out of memory",),
        versions={"fedtune": "0.1.0", "python": "3.11.7", "torch": "2.10.0"},
    )
