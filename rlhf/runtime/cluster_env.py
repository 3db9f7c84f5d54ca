"""Finds out from the environment that `srun` or `mpirun` has started this process, as one of several ranks.

Each of them says in its own variables which rank a process is; torch reads RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun sets. Ranks started by torchrun keep what it says, also
where srun started torchrun. Sources: the manual page of srun, "OUTPUT ENVIRONMENT VARIABLES"; Open MPI's FAQ,
"environment variables"; Hydra's and MVAPICH2's user guides.
Imports only the standard library: `run_pipeline.py` calls this before it imports anything large.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

STARTED_BY = "RLHF_STARTED_BY"
"""Environment variable with the name of the program that started the ranks, where it was not torchrun."""
_DEFAULT_PORT = 29500  # torch's
_PORTS = range(15000, 30000)  # below those that systems give to clients
_LOOPBACK = "127.0.0.1"


class _Names(NamedTuple):
    """The variables of a launcher; of several names for one thing the first that is set counts."""

    program: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]  # the same for all ranks, and different from other jobs'


_OPEN_MPI = _Names(
    program="mpirun",
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
    local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
    job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
)
_MVAPICH = _Names(
    program="mpirun",
    rank="MV2_COMM_WORLD_RANK",
    size="MV2_COMM_WORLD_SIZE",
    local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
    local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
    job=(),
)
_HYDRA = _Names(  # MPICH, Intel MPI, Cray
    program="mpirun",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
    local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    job=("PMI_JOBID",),
)
_SLURM = _Names(
    program="srun",
    rank="SLURM_PROCID",
    size="SLURM_STEP_NUM_TASKS",  # not SLURM_NTASKS, which batch scripts have as well
    local_rank=("SLURM_LOCALID",),
    local_size=(),
    job=("SLURM_JOB_ID", "SLURM_JOBID"),
)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch reads, for a process that srun or mpirun started as one of several; empty for others.

    Raises:
        ValueError: what is missing or contradicts itself, and what to set.
    """
    if "RANK" in environment:  # torchrun's word counts, or that of our own launcher
        is_deepspeed = "LOCAL_SIZE" in environment and "LOCAL_WORLD_SIZE" not in environment
        return {"LOCAL_WORLD_SIZE": environment["LOCAL_SIZE"]} if is_deepspeed else {}
    names = _launcher(environment)
    if names is None or _number(environment, names.size) == 1:  # also a shell of srun's
        return {}
    rank, size = _number(environment, names.rank), _number(environment, names.size)
    local_rank = _number(environment, *names.local_rank)
    local_size = _slurm_tasks(environment) if names is _SLURM else _number(environment, *names.local_size)
    if not (rank < size and local_rank < local_size <= size and local_rank <= rank):
        raise ValueError(
            f"{names.program}: found rank {rank} of {size}, on this machine {local_rank} of {local_size}, which cannot "
            f"be; expected variables of one launcher. Start the ranks from a shell without those of another."
        )
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": _address(environment, names, several_hosts=local_size < size),
        "MASTER_PORT": environment.get("MASTER_PORT") or _port(environment, names),
        STARTED_BY: names.program,
    }


def check_tasks(environment: Mapping[str, str], *, ranks: int) -> None:
    """Check that `launch.ranks`, if it was given, is what srun or mpirun has started on this machine.

    Raises:
        ValueError: it is another number.
    """
    program, found = environment.get(STARTED_BY), environment.get("LOCAL_WORLD_SIZE")
    if program is None or ranks == 1 or found == str(ranks):
        return
    option = "--ntasks-per-node" if program == "srun" else "the number of processes of each host"
    raise ValueError(
        f"launch.ranks={ranks}: {program} has started {found} of {environment['WORLD_SIZE']} tasks on this machine, "
        f"and each task is one rank; set {option} to {ranks}, or leave launch.ranks out."
    )


def _launcher(environment: Mapping[str, str]) -> _Names | None:
    """The launcher that started this process, the innermost where one started the other."""
    # Hydra starts its proxies with srun, whose variables the ranks inherit. Under `srun --mpi=pmi2` both are srun's.
    is_same = environment.get(_SLURM.size) == environment.get(_HYDRA.size)
    order = (_OPEN_MPI, _MVAPICH, _SLURM, _HYDRA) if is_same else (_OPEN_MPI, _MVAPICH, _HYDRA, _SLURM)
    return next((names for names in order if names.rank in environment and names.size in environment), None)


def _number(environment: Mapping[str, str], *names: str) -> int:
    for name in names:
        if name in environment:
            if not environment[name].isdigit():
                raise ValueError(f"{name}={environment[name]!r}: expected a number, as the launcher of the ranks sets.")
            return int(environment[name])
    raise ValueError(
        f"{' and '.join(names)}: missing, although the launcher has started several ranks; without it a rank does not "
        "know its device. Set it, or start the ranks with torchrun."
    )


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of this step on this node, from a text such as `2(x3),1` with an entry for each node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    node = _number(environment, "SLURM_NODEID")
    if node >= len(counts):
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE={text!r} has no entry for node {node}; expected one for each, as srun sets."
        )
    return counts[node]


def _address(environment: Mapping[str, str], names: _Names, *, several_hosts: bool) -> str:
    """Where the ranks meet: on the machine of rank 0."""
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    if not several_hosts:
        return _LOOPBACK
    nodes = environment.get("SLURM_STEP_NODELIST", "") if names is _SLURM else ""
    if not nodes:
        how = "export MASTER_ADDR=HOST" if names is _SLURM else "mpirun -x MASTER_ADDR=HOST (MPICH: -genv MASTER_ADDR)"
        raise ValueError(
            f"MASTER_ADDR: missing, although {names.program} has started ranks on several machines; expected the name "
            f"or address of the machine of rank 0, where they meet. Set it, as in {how}."
        )
    return first_node(nodes)


def first_node(nodes: str) -> str:
    """The first host of a list in Slurm's notation: `gpu-[07-09,11],cpu1` begins with `gpu-07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""


def _port(environment: Mapping[str, str], names: _Names) -> str:
    """A port that all ranks of a job compute alike, and other jobs most likely not."""
    job = next((environment[name] for name in names.job if environment.get(name)), "")
    if not job:
        return str(_DEFAULT_PORT)
    text = f"{job}.{environment.get('SLURM_STEP_ID', '')}"
    return str(_PORTS[zlib.crc32(text.encode()) % len(_PORTS)])
