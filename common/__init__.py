"""What the stages share. A stage calls a room by its name; these names are for other people's scripts."""

from common.cli import parse, pick_device, run_main, setup
from common.judges import load_function, load_functions
from common.nets import adamw, freeze, load, load_gpt, load_scalar, save_model
from common.runs import Run, read_metrics
from data.rng import generator, seed_of
from fast import keep_memory
