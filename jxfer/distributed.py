"""Several processes as one job: how they find each other, which of them writes, and what they tell one another.

Every process runs the same program in the same order; what depends on files is asked of process 0 and told to all.
What is here goes over jax's coordination service, from host to host; arrays go over the devices.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from jxfer.typing import InputError, InterruptedRun, PyTree

VARIABLES = {
    "coordinator": "JXFER_COORDINATOR",
    "num_processes": "JXFER_NUM_PROCESSES",
    "process_id": "JXFER_PROCESS_ID",
}
"""Option of the command line -> environment variable that says the same."""

START_SECS = 300
"""How long processes wait for each other at the start."""

HEARTBEAT_SECS = 60
"""After which silence jax itself ends all processes; `jxfer.peers` finds out earlier, and says which was lost."""

_HELP = "give --coordinator, --num-processes and --process-id, or --num-processes 1 to work alone"

FOREVER_MS = 10**9  # of a wait that `jxfer.peers` ends where a process is lost

_ERRORS: dict[str, type[Exception]] = {"InputError": InputError, "InterruptedRun": InterruptedRun}
"""What process 0 may raise for all."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many this is, and where they meet."""

    num_processes: int
    process_id: int
    coordinator: str
    """`HOST:PORT` at which process 0 listens."""
    local_device_ids: tuple[int, ...] | None = None
    """The GPUs of the machine that are this process's; None: all it can see."""


def find_place(options: Mapping[str, str]) -> Place | None:
    """Returns this process's place among several, None where it works alone.

    Options come before `JXFER_*` variables, both before what the cluster says: SLURM, TPU pods, Open MPI, Kubernetes.
    `--num-processes 1` lets processes that a cluster starts together work each for itself.

    Raises:
      InputError: some of the three settings are missing, or they do not fit each other.
    """
    given = {name: os.environ[variable] for name, variable in VARIABLES.items() if os.environ.get(variable)}
    given |= {name: options[name] for name in VARIABLES if name in options}
    if not given:
        return _of_cluster()
    numbers = {name: _whole(name, given[name]) for name in ("num_processes", "process_id") if name in given}
    opted_out = "num_processes" in options and "process_id" not in options
    if numbers.get("num_processes") == 1 and (opted_out or not numbers.get("process_id")):
        return None
    if missing := [_names(name) for name in VARIABLES if name not in given]:
        present = " and ".join(f"{_option(name)} {value}" for name, value in given.items())
        raise InputError(f"{present} given, but no {' and no '.join(missing)}; give all three or none")
    num_processes, process_id = numbers["num_processes"], numbers["process_id"]
    if process_id >= num_processes:
        raise InputError(f"--process-id {process_id} is none of {num_processes} processes; they count from 0")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--coordinator takes HOST:PORT of process 0, not `{given['coordinator']}`")
    return Place(num_processes, process_id, given["coordinator"])


def start(options: Mapping[str, str]) -> bool:
    """Joins the other processes, where there are any, and tells whether there are; before jax does anything else.

    A process that the others do not answer within `START_SECS` ends with a line that says so, and status 2.

    Raises:
      InputError: as `find_place`; or process 0 cannot listen where the others look for it.
    """
    place = find_place(options)
    if place is None:
        return False
    if place.process_id == 0:
        _check_port(place)
    import jax

    with contextlib.suppress(AttributeError):  # it would take SIGTERM away from `jxfer.session`
        jax.config.update("jax_enable_preemption_service", False)
    with _deadline(place):
        try:
            # Where process 0 is killed its service is gone, and jax ends the others in its own words before a thread of
            # Python runs; a `missed_heartbeat_callback` in Python aborts (std::bad_cast, jaxlib 0.10.2).
            jax.distributed.initialize(
                place.coordinator,
                place.num_processes,
                place.process_id,
                local_device_ids=place.local_device_ids,
                cluster_detection_method="deactivate",
                # Our deadline comes first: jax would end the process with a stack trace.
                initialization_timeout=START_SECS + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECS,
                shutdown_timeout_seconds=HEARTBEAT_SECS,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            who = f"process {place.process_id} of {place.num_processes}"
            raise InputError(f"{who} cannot meet the others at {place.coordinator}: {reason}") from None
    return True


def client() -> Any:
    """Returns jax's client of the coordination service, None where this process works alone."""
    return _state().client


def count() -> int:
    """Returns the number of processes."""
    return int(_state().num_processes)


def index() -> int:
    """Returns which process this is."""
    return int(_state().process_id)


def is_main() -> bool:
    """Tells whether this is process 0, which alone writes and shows."""
    return index() == 0


def gather(value: T) -> list[T]:
    """Returns every process's JSON-ready value, in the order of the processes; all must call it."""
    if count() == 1:
        return [value]
    found = _exchange(json.dumps(value))
    return [json.loads(found[str(process)]) for process in range(count())]


def on_main(function: Callable[[], T]) -> T:
    """Returns what `function` returns in process 0, where alone it is called, after it has; all must call this.

    Args:
      function: returns something JSON-ready; what JSON has no type for comes back as JSON has it.

    Raises:
      InputError, InterruptedRun: as `function`, in all processes.
    """
    if count() == 1:
        return function()
    text = _exchange(_call(function) if is_main() else None)["0"]
    outcome = json.loads(text)
    if "error" in outcome:
        raise _ERRORS[outcome["error"]](outcome["message"])
    return outcome["value"]


def hand_over(name: str, value: T) -> list[T]:
    """Returns in process 0 every process's JSON-ready value, in their order; the others give theirs and get nothing.

    All must call it with the same name, which is used once; in any thread, as nobody but process 0 waits.
    """
    if count() == 1:
        return [value]
    service, folder = client(), f"jxfer/handed/{name}/"
    if not is_main():
        service.key_value_set(f"{folder}{index()}", json.dumps(value))
        return []
    texts = [service.blocking_key_value_get(f"{folder}{process}", FOREVER_MS) for process in range(1, count())]
    service.key_value_delete(folder)
    return [value, *map(json.loads, texts)]


def barrier() -> None:
    """Waits until every process has come here."""
    if count() > 1:
        _exchange(None)


def everywhere(tree: PyTree) -> PyTree:
    """Returns the tree with its arrays whole on every device, so that each process can fetch them; waits for nothing.

    All processes must call it. Where there is one, and for what a process holds whole, nothing is moved.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def replicate(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        assert isinstance(leaf.sharding, NamedSharding)
        return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))

    return tree if count() == 1 else jax.tree.map(replicate, tree)


def fetch(tree: PyTree) -> PyTree:
    """Returns the tree with its arrays whole on the host, wherever they lie; all processes must call it."""
    import jax

    return jax.device_get(everywhere(tree))


def same(arrays: PyTree) -> PyTree:
    """Returns process 0's arrays, on the host; all processes must call it, with arrays of the same shapes."""
    if count() == 1:
        return arrays
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(arrays)


_numbers = itertools.count()
"""Of the exchanges so far, which all processes make in the same order."""


def _exchange(text: str | None) -> dict[str, str]:
    """Returns the texts of the processes that gave one, by their number, once all have come here."""
    service, number = client(), next(_numbers)
    folder = f"jxfer/said/{number}/"
    if text is not None:
        service.key_value_set(f"{folder}{index()}", text)
    service.wait_at_barrier(f"jxfer/{number}", FOREVER_MS)
    if is_main() and number:
        service.key_value_delete(f"jxfer/said/{number - 1}/")  # all are here, so all have read it
    return {key.rpartition("/")[2]: value for key, value in service.key_value_dir_get(folder)}


def _call(function: Callable[[], Any]) -> str:
    try:
        return json.dumps({"value": function()})
    except tuple(_ERRORS.values()) as error:
        return json.dumps({"error": type(error).__name__, "message": str(error)})


def _state() -> Any:
    from jax._src import distributed  # jax has no public name for what its host-side coordination offers

    return distributed.global_state


@contextlib.contextmanager
def _deadline(place: Place) -> Iterator[None]:
    """Ends the process where the block takes longer than `START_SECS`."""

    def give_up() -> None:
        print(f"jxfer: error: {_nobody(place)}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(START_SECS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_port(place: Place) -> None:
    """Refuses a port that is taken, with which jax would crash."""
    dual = socket.has_dualstack_ipv6()
    address = "", int(place.coordinator.rpartition(":")[2])
    try:
        socket.create_server(address, family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual).close()
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise InputError(f"process 0 cannot listen at {place.coordinator}: {reason}; choose another port") from None


def _nobody(place: Place) -> str:
    """Returns why a process has not met the others."""
    who, where = f"process {place.process_id} of {place.num_processes}", place.coordinator
    if place.process_id == 0:
        return f"{who} waited {START_SECS} s at {where}, and not all others came; start each of them with its own id"
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return f"{who} had no answer from process 0 at {where} for {START_SECS} s ({reason}); is it running there?"
    return f"{who} reached {where}, but not all others came within {START_SECS} s; start them all, each with its own id"


def _of_cluster() -> Place | None:
    """Returns the place that SLURM, or else jax's own detection of other clusters, gives this process."""
    from jax._src import clusters

    found = {cluster.name: cluster for cluster in clusters.ClusterEnv._cluster_types if not cluster.opt_in_only_method}
    slurm = found.pop("slurm")
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        # Of the step, as `srun` starts it: an allocation for many tasks may run a single one, and a job array does.
        num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
        if num_tasks == 1:
            return None
        return Place(num_tasks, int(os.environ["SLURM_PROCID"]), _address(slurm), _slurm_devices())
    if importlib.util.find_spec("kubernetes") is None or "JOB_COMPLETION_INDEX" not in os.environ:
        found.pop("k8s", None)
    try:
        cluster = next((cluster for cluster in found.values() if cluster.is_env_present()), None)
        if cluster is None or (num_processes := cluster.get_process_count()) == 1:
            return None
        local = cluster.get_local_process_id()
        devices = None if local is None else (local,)
        return Place(num_processes, cluster.get_process_id(), _address(cluster), devices)
    except Exception as error:  # of the network, or of what the cluster is asked over it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"this cluster does not say which process of how many this is: {reason}; {_HELP}") from error


def _address(cluster: Any) -> str:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    return str(cluster.get_coordinator_address(timeout_secs=START_SECS, override_coordinator_port=port))


def _slurm_devices() -> tuple[int, ...] | None:
    """Returns this task's share of the GPUs that all tasks of its node see; None where each sees its own, or is alone.

    jax would give each task one, which leaves the others of a node with one task unused.
    """
    per_node: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):  # such as 4(x2),3
        number, _, repeats = part.rstrip(")").partition("(x")
        per_node += [int(number)] * int(repeats or 1)
    num_tasks = per_node[int(os.environ.get("SLURM_NODEID", 0)) % len(per_node)]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    bound = {"SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "JAX_LOCAL_DEVICE_IDS"} & os.environ.keys()
    if bound or num_tasks == 1 or len(visible) < num_tasks:
        return None
    share, local = len(visible) // num_tasks, int(os.environ.get("SLURM_LOCALID", 0))
    return tuple(range(local * share, (local + 1) * share))


def _whole(name: str, value: str) -> int:
    if not value.isdecimal() or (name == "num_processes" and int(value) == 0):
        least = 1 if name == "num_processes" else 0
        raise InputError(f"{_names(name)} takes a whole number, {least} or more, not `{value}`")
    return int(value)


def _names(name: str) -> str:
    return f"{_option(name)} (or {VARIABLES[name]})"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
