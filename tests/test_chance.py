"""Random numbers: what the keys promise."""

import itertools

import numpy as np
import torch

from data.rng import generator, seed_of, shuffler


def test_keys_that_differ_in_anything_give_other_seeds():
    numbers = [0, 1, 2, "0", "batches", "hold out"]
    keys = [key for n in range(4) for key in itertools.product(numbers, repeat=n)]
    assert len({seed_of(*key) for key in keys}) == len(keys)  # (s, 1) and (s, 1, 0, 0) among them
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)


def test_all_bits_of_a_key_reach_torch():
    """numpy's own Mersenne twister, word for word; torch's seeding would take 32 bits of the seed only."""
    for key in (("rollout", 0, 3), (1,)):
        words = np.random.MT19937(seed_of(*key)).random_raw(2001)[1:]  # numpy gives out the last seeded word first
        drawn = torch.rand(2000, generator=generator(*key))
        assert (drawn.numpy() == ((words & (2**24 - 1)) / 2**24).astype(np.float32)).all()
    assert torch.equal(torch.rand(9, generator=generator("a")), torch.rand(9, generator=generator("a")))


def test_what_is_held_out_is_not_drawn_with_the_numbers_of_the_first_shuffle():
    assert (shuffler("hold out").permutation(100) != shuffler("batches", 0, 0).permutation(100)).any()
