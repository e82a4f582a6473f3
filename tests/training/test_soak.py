"""A long run takes no more memory and no more files than a short one."""

import gc

import psutil
import pytest
from transformers import TrainerCallback

from tests.runs import protected_trainer, uneven_rows


class Resources(TrainerCallback):
    """Resident bytes and open files of this process after every hundredth step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 100 == 0:
            gc.collect()
            process = psutil.Process()
            self.seen[state.global_step] = process.memory_info().rss, process.num_fds()


@pytest.mark.soak
def test_two_thousand_steps_hold_no_more_than_one_thousand(tmp_path):
    resources = Resources()
    trainer, guard = protected_trainer(
        tmp_path,
        rows=uneven_rows(64),
        callbacks=[resources],
        gradient_accumulation_steps=1,
        max_steps=2000,
        logging_steps=10,
        save_steps=50,
        save_total_limit=2,
        lora={"lora_dropout": 0.1},
    )
    trainer.train()
    (before, files_before), (after, files_after) = resources.seen[1000], resources.seen[2000]
    print({step: round(resident / 2**20, 1) for step, (resident, _) in resources.seen.items()})
    assert (after - before) / before < 0.01
    assert files_after <= files_before
    assert guard.skipped_steps == 0
