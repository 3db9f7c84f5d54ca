"""Ranks that srun or mpirun has started, by variables that real ones set: Slurm 22.05, Open MPI 4.1, MPICH 4.0."""

import pytest

from rlhf.runtime.cluster_env import check_tasks, first_node, rank_variables

SRUN = {  # `srun -N 2 -n 3`, the third task
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "17"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "1306329089",
}
TWO_HOSTS = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def ranks(environment):
    """RANK of WORLD_SIZE, LOCAL_RANK of LOCAL_WORLD_SIZE, and where they meet."""
    found = rank_variables(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return [found.get(name) for name in names]


def test_a_task_of_srun_is_a_rank():
    assert ranks(SRUN) == ["2", "3", "0", "1", "n1"]
    first = SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert ranks(first) == ["1", "3", "1", "2", "n1"]
    assert rank_variables(first)["MASTER_PORT"] == rank_variables(SRUN)["MASTER_PORT"]


def test_steps_of_a_job_and_other_jobs_meet_elsewhere():
    steps = [SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step} for job in "12" for step in "34"]
    ports = {rank_variables(step)["MASTER_PORT"] for step in steps}
    assert len(ports) == 4


def test_a_batch_script_and_a_shell_of_srun_are_no_ranks():
    assert rank_variables(BATCH) == {}
    assert rank_variables(SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert rank_variables({}) == {}


def test_processes_of_mpirun_are_ranks_that_meet_on_their_machine():
    assert ranks(OPEN_MPI) == ["1", "2", "1", "2", "127.0.0.1"]
    assert ranks(MPICH) == ["1", "2", "1", "2", "127.0.0.1"]
    mvapich = {key.replace("OMPI", "MV2"): value for key, value in OPEN_MPI.items()}
    assert ranks(mvapich) == ["1", "2", "1", "2", "127.0.0.1"]


def test_mpirun_that_srun_has_helped_to_start_counts_and_srun_that_speaks_pmi_too():
    helped = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    assert ranks(helped | OPEN_MPI)[:4] == ["1", "2", "1", "2"]
    eight = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "MASTER_ADDR": "n1"}
    assert ranks(helped | eight) == ["5", "8", "1", "4", "n1"]
    assert ranks(SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3"}) == ["2", "3", "0", "1", "n1"]


def test_what_torchrun_says_counts_and_what_deepspeeds_launcher_leaves_out_is_added():
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    assert rank_variables(SRUN | torchrun) == {}
    assert rank_variables({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}) == {"LOCAL_WORLD_SIZE": "2"}


def test_an_address_and_a_port_of_the_users_count():
    given = rank_variables(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "7")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-[07-09,11],cpu1", "gpu-07"),
        ("cpu1,gpu-[07-09]", "cpu1"),
        ("rack[2-3]n[01,05]", "rack2n01"),
        ("alone", "alone"),
        ("n[12]", "n12"),
    ],
)
def test_the_first_node_of_slurms_lists(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (OPEN_MPI | TWO_HOSTS, "MASTER_ADDR: missing, .* -x"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_STEP_NODELIST"}, "export MASTER_ADDR=HOST"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"}, "SLURM_LOCALID: missing"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3"}, "has no entry for node 1"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x': expected a number"),
        (SRUN | {"SLURM_PROCID": "3"}, "rank 3 of 3"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "on this machine 2 of 2"),
    ],
)  # fmt: skip
def test_what_is_missing_or_cannot_be_is_said_in_a_sentence(environment, message):
    with pytest.raises(ValueError, match=message):
        rank_variables(environment)


def test_ranks_that_the_run_wants_and_the_launcher_has_not_started_are_refused():
    started = rank_variables(SRUN)
    check_tasks(started, ranks=1)  # the usual value
    check_tasks({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, ranks=8)  # torchrun
    with pytest.raises(ValueError, match=r"srun has started 1 of 3 tasks .* set --ntasks-per-node to 8"):
        check_tasks(started, ranks=8)
