"""Random numbers that depend only on a key (purpose, seed, step, …), so that a resumed run needs no saved state."""

import hashlib

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """Return 63 bits that a hash makes of the key. Keys that differ in anything give unrelated seeds."""
    digest = hashlib.sha256(repr(key).encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def shuffler(*key: int | str) -> np.random.Generator:
    """Return numpy's generator for the key."""
    return np.random.default_rng(seed_of(*key))


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator for the key.

    torch's own seeding looks at 32 bits only, and among 100,000 keys about one pair would share them. So the 624 words
    of the Mersenne twister come from numpy, which looks at all bits.
    """
    result = torch.Generator()
    state = result.get_state()  # 24 bytes of counters, then each word in 8 bytes
    words = np.random.MT19937(seed_of(*key)).state["state"]["key"]  # (624,)
    state[24 : 24 + 8 * len(words)] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    result.set_state(state)
    return result
