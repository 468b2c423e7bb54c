"""contract.py NAME [stages]: test_contract's worker for one recipe."""
import sys, tempfile
from pathlib import Path
import torch
from mmcore import checkpoint
from tests.distributed.launch import run_ranks
import tests.systems.test_contract as tc
if __name__ == "__main__":
    name = sys.argv[1]
    one = Path(tempfile.mkdtemp()); 
    [alone] = run_ranks("worker_contract", 1, one, package="tests.systems", names=[name], one=str(one))
    print("alone", alone)
    tc.test_the_loss_falls((one, alone), name)
    tc.test_a_run_that_was_stopped_goes_on_to_the_bit((one, alone), name)
    print("resumes")
    tc.test_a_batch_is_a_pure_function_of_the_step((one, alone), name)
    tc.test_what_is_exported_loads_with_the_same_weights_or_is_refused_in_a_sentence((one, alone), name, Path(tempfile.mkdtemp()))
    tc.test_settings_come_back_from_the_file_that_a_run_keeps((one, alone), name)
    print("exports, settings")
    two = Path(tempfile.mkdtemp())
    stages = [int(x) for x in sys.argv[2].split(",")] if len(sys.argv) > 2 else [0,1,2,3]
    tc.STAGES = stages
    together = run_ranks("worker_contract", 2, two, package="tests.systems", one=str(one), names=[name], stages=stages)[0]
    print("together", together)
    tc.test_two_ranks_under_every_stage_train_as_one_process((one, alone), together, name)
    print("ok")
