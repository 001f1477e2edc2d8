"""Write secagg_v1.json: known answers of secure aggregation, and input that must be refused.

    python tests/vectors/make_secagg_v1.py

Expected values come from RFCs and FIPS 197's test suite, or from simple_secagg.py, which shares
no code with fedtune. All bytes are hexadecimal digits, polynomials decimal numbers from the
constant up. Any other implementation of the protocol can test itself against the file.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import simple_secagg as simple  # noqa: E402

OUTPUT = HERE / "secagg_v1.json"
NAMES = ["anna", "berlin", "charité", "dhaka"]
DROPPED = 1  # shares its keys and is not heard of again
BITS, SLOTS, THRESHOLD = 20, 5, 3
HALF = 2 ** (BITS - 1)
VALUES = [[0, 1, -1, 7, -9], [5, 5, 5, 5, 5], [-(2**17), 2**17, 3, 0, 1], [99999, -9, 0, 12, 8]]

# RFC 7748, section 6.1.
RFC7748 = {
    "private": "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
    "public": "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
    "other_private": "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
    "other_public": "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    "shared": "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
}
# RFC 8032, section 7.1, tests 1 to 3.
RFC8032 = [
    {
        "private": "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "public": "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "message": "",
        "signature": "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    },
    {
        "private": "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "public": "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "message": "72",
        "signature": "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    },
    {
        "private": "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "public": "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "message": "af82",
        "signature": "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    },
]
# AES-256 of the block zero, which is the first block of a mask: NIST's AESAVS (KeySbox, no. 0),
# and H of test case 13 of the GCM specification. The key stream of SP 800-38A, F.5.5 begins at
# another counter, so no mask has it.
AES_OF_ZERO = {
    "c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558": (
        "46f2fb342d6f0ab477476fc501242c5f"
    ),
    "00" * 32: "dc95c078a2408989ad48a21492842087",
}
# Bernstein, "Curve25519", "How do I validate Curve25519 public keys?": points of order 1, 2, 4
# and 8 on the curve and its twist, and the same in encodings above the field's prime.
SMALL_ORDER = {
    "0": 0,
    "1": 1,
    "order 8, first": int.from_bytes(
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), "little"
    ),
    "order 8, second": int.from_bytes(
        bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), "little"
    ),
    "p - 1": 2**255 - 20,
    "p": 2**255 - 19,
    "p + 1": 2**255 - 18,
}


def made_up(label: str) -> bytes:
    """32 bytes that look random."""
    return hashlib.sha256(label.encode()).digest()


def polynomial(label: str, secret: bytes) -> list[int]:
    """Coefficients from the constant up."""
    rest = [int.from_bytes(made_up(f"{label} {i}"), "big") for i in range(1, THRESHOLD)]
    return [int.from_bytes(secret, "little"), *rest]


def plain(value: Any) -> Any:
    """Bytes as hexadecimal digits, all the way down."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def session() -> dict[str, Any]:
    """Four clients, of which one drops out: every secret, and every byte that follows."""
    identities = {name: made_up(f"identity {name}") for name in ["", *NAMES]}
    roster = {name: simple.ed25519_public(key) for name, key in identities.items()}
    roster_digest = simple.roster_digest(roster)
    digests = [made_up(what) for what in ("base", "manifest", "config", "adapter")]
    digest = simple.session_digest("study-7", 300, 2, digests, roster_digest)
    clients, adverts = [], []
    for name in NAMES:
        secret = {what: made_up(f"{what} {name}") for what in ("sealing", "masking", "self_mask")}
        advert = {
            "client": name.encode(),
            "sealing_key": simple.x25519_public(secret["sealing"]),
            "masking_key": simple.x25519_public(secret["masking"]),
            "commitment": simple.commitment(secret["self_mask"]),
        }
        signed = simple.advert_signed(digest, advert)
        advert["signature"] = simple.ed25519_sign(identities[name], signed)
        adverts.append(advert)
        polynomials = {
            "masking": polynomial(f"key shares of {name}", secret["masking"]),
            "self_mask": polynomial(f"mask shares of {name}", secret["self_mask"]),
        }
        clients.append({"name": name, "secret": secret, "polynomials": polynomials})
    binding = simple.cohort_digest(digest, adverts)
    everyone = range(len(NAMES))
    survivors = [place for place in everyone if place != DROPPED]
    vouched = simple.sharers_signed(binding, list(everyone))
    signed = simple.survivors_signed(binding, list(everyone), survivors)
    for own, client in enumerate(clients):
        name, secret = client["name"], client["secret"]
        client["shares"] = [
            simple.share_at(client["polynomials"]["masking"], place + 1)
            + simple.share_at(client["polynomials"]["self_mask"], place + 1)
            for place in everyone
        ]
        client["sealed"] = [
            simple.sealed_share(
                secret["sealing"],
                adverts[place]["sealing_key"],
                binding,
                name,
                NAMES[place],
                client["shares"][place],
            )
            for place in everyone
            if place != own
        ]
        seeds = {}
        for other in everyone:
            if other != own:
                pair = [NAMES[place] for place in sorted((own, other))]
                public = adverts[other]["masking_key"]
                seeds[other] = simple.derived_secret(
                    secret["masking"], public, "pairwise mask", binding, pair
                )
        client["pairwise_seeds"] = [seeds.get(place, b"") for place in everyone]
        client["values"] = VALUES[own]
        vector = simple.masked(VALUES[own], BITS, own, secret["self_mask"], seeds)
        client["packed"] = simple.pack(vector, BITS)
        client["voucher"] = simple.ed25519_sign(identities[name], vouched)
        client["survivors_signature"] = simple.ed25519_sign(identities[name], signed)
    for own, client in enumerate(clients):
        client["reveal"] = {
            "self_masks": [clients[place]["shares"][own][33:] for place in survivors],
            "masking_keys": [clients[DROPPED]["shares"][own][:33]],
        }
    return {
        "run_id": "study-7",
        "round": 300,
        "attempt": 2,
        "digests": digests,
        "identities": identities,
        "roster": roster,
        "roster_digest": roster_digest,
        "digest": digest,
        "adverts": [{**advert, "client": advert["client"].decode()} for advert in adverts],
        "cohort_digest": binding,
        "bits": BITS,
        "threshold": THRESHOLD,
        "sharers": list(everyone),
        "survivors": survivors,
        "sharers_signed": vouched,
        "survivors_signed": signed,
        "clients": clients,
        "sum": [sum(VALUES[place][slot] for place in survivors) for slot in range(SLOTS)],
    }


def transcripts() -> list[dict[str, Any]]:
    """Fields that would be the same if their lengths were left out."""
    rows = []
    for label, fields in [
        ("test", []),
        ("test", [b""]),
        ("test", [b"", b""]),
        ("test", [b"ab", b"c"]),
        ("test", [b"a", b"bc"]),
        ("testa", [b"bc"]),
        ("über", [bytes(300)]),
    ]:
        joined = simple.transcript(label, fields)
        digest = simple.digest(label, fields)
        rows.append({"label": label, "fields": fields, "transcript": joined, "digest": digest})
    return rows


def masks() -> list[dict[str, Any]]:
    """Seeds, and the words of the ring that come of them."""
    rows = []
    for bits in (8, 20, 32, 33, 56):
        seed = made_up(f"seed {bits}")
        rows.append({"seed": seed, "bits": bits, "words": simple.expand(seed, 9, bits)})
    return rows


def packings() -> list[dict[str, Any]]:
    """Words, and the bytes that they are packed into."""
    rows = []
    for bits in (8, 9, 20, 25, 26, 32, 33, 49, 56):
        for size in (0, 1, 7, 8, 9):
            stream = simple.expand(made_up(f"packing {bits} {size}"), size, bits)
            rows.append({"bits": bits, "words": stream, "packed": simple.pack(stream, bits)})
        ones = [2**bits - 1] * 3
        rows.append({"bits": bits, "words": ones, "packed": simple.pack(ones, bits)})
    return rows


def bad(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Input to be refused, each with the exact error; `what` says which step takes it."""
    rows: list[dict[str, Any]] = []

    def row(name: str, what: str, error: str, value: Any) -> None:
        rows.append({"name": f"bad_{name}", "what": what, "error": error, "value": value})

    for name, u in SMALL_ORDER.items():
        for top in (0, 1):
            encoded = (u | top << 255).to_bytes(32, "little")
            assert simple.x25519(made_up("any key"), encoded) == bytes(32)
            spelled = f"public_key_{name}" + (" with the top bit set" if top else "")
            row(spelled, "public key", "BadSignature", encoded)
    row("public_key_of_31_bytes", "public key", "BadSignature", bytes([9]) + bytes(30))
    row("public_key_of_33_bytes", "public key", "BadSignature", bytes([9]) + bytes(32))
    row("public_key_of_no_bytes", "public key", "BadSignature", b"")

    advert = whole["adverts"][0]
    for field in ("sealing_key", "masking_key", "commitment", "signature"):
        cut = {**advert, field: advert[field][:-1]}
        row(f"advert_with_a_cut_{field}", "advert", "MalformedMessage", cut)
    signature = advert["signature"]
    for bit in (0, 255, 256, 511):
        flipped = bytearray(signature)
        flipped[bit // 8] ^= 1 << bit % 8
        value = {**advert, "signature": bytes(flipped)}
        row(f"advert_signature_with_bit_{bit}_flipped", "advert", "BadSignature", value)
    scalar = int.from_bytes(signature[32:], "little") + simple.ORDER
    value = {**advert, "signature": signature[:32] + scalar.to_bytes(32, "little")}
    row("advert_signature_with_a_non_canonical_scalar", "advert", "BadSignature", value)
    row("advert_renamed", "advert", "BadSignature", {**advert, "client": NAMES[1]})

    for name, share in {
        "of_the_prime": simple.PRIME.to_bytes(33, "little"),
        "above_the_prime": (simple.PRIME + 1).to_bytes(33, "little"),
        "of_all_ones": b"\xff" * 33,
        "of_32_bytes": bytes(32),
        "of_34_bytes": bytes(34),
    }.items():
        row(f"share_{name}", "share", "MalformedMessage", share)

    packed = whole["clients"][0]["packed"]
    assert len(packed) * 8 - BITS * SLOTS == 4
    for name, data in {
        "with_padding_in_its_lowest_bit": packed[:-1] + bytes([packed[-1] | 0x10]),
        "with_padding_in_its_highest_bit": packed[:-1] + bytes([packed[-1] | 0x80]),
        "one_byte_short": packed[:-1],
        "one_byte_long": packed + b"\0",
        "of_no_bytes": b"",
    }.items():
        row(f"packed_vector_{name}", "packed", "MalformedMessage", data)

    sealed = whole["clients"][2]["sealed"][0]
    for bit in (0, 33 * 8, 66 * 8, 82 * 8 - 1):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        row(f"sealed_share_with_bit_{bit}_flipped", "sealed", "BadSignature", bytes(flipped))
    row("sealed_share_cut", "sealed", "BadSignature", sealed[:-1])
    row("sealed_share_for_another", "sealed", "BadSignature", whole["clients"][2]["sealed"][1])
    row("sealed_share_of_another", "sealed", "BadSignature", whole["clients"][3]["sealed"][0])
    return rows


def document() -> dict[str, Any]:
    """The whole file."""
    whole = session()
    found = {
        "transcripts": transcripts(),
        "x25519": RFC7748,
        "ed25519": RFC8032,
        "aes_of_zero": AES_OF_ZERO,
        "masks": masks(),
        "packings": packings(),
        "session": whole,
        "bad": bad(whole),
    }
    return plain(found)


if __name__ == "__main__":
    OUTPUT.write_text(json.dumps(document(), indent=1, ensure_ascii=False) + "\n", "utf-8")
