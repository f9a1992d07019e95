"""What the stages share. These are the names that other people's scripts load; a stage calls a room by its name."""

from common.cli import adamw, context, freeze, parse, run_main, step_optimizer, warmup_cosine
from common.dist import (
    RANK,
    WORLD,
    gather,
    gather_objects,
    masked_mean,
    pick_device,
    say,
    setup,
    share,
    together,
    total,
)
from common.judges import ask, load_function, load_functions
from common.nets import (
    check_vocabulary,
    known_prompts,
    load,
    load_gpt,
    load_scalar,
    prompt_key,
    save_file,
    save_model,
)
from common.runs import Run, fingerprint, peak_memory, read_metrics, started_from
from common.sharding import shard, sum_gradients, whole
from data.files import InputError
from data.rng import generator, seed_of
from fast import Linear, keep_memory
