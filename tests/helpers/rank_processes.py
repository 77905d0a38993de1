"""Processes that run a function as ranks of one gloo group, for tests of several processes."""

import io
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = 30  # seconds that a rank may wait for another before the test fails


class RankProcesses:
    """Processes that are started once for many runs; each run has its own process group.

    Args:
        folder: an empty folder for the files by which the processes find each other.
        size: number of processes.
        timeout: seconds that a rank may wait for another.
    """

    def __init__(self, folder, size=2, timeout=TIMEOUT):
        self._folder, self._runs, self._timeout = folder, 0, timeout
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(size):
            end, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, other_end, timeout), daemon=True)
            process.start()
            self._ends.append(end)
            self._processes.append(process)

    def run(self, function, *arguments):
        """The result of `function(rank, *arguments)` on each rank; the function's module must be importable."""
        self._runs += 1
        for end in self._ends:
            end.send((function, arguments, str(self._folder / f"run {self._runs}")))
        answers = []
        for rank, end in enumerate(self._ends):
            assert end.poll(2 * self._timeout), f"rank {rank} does not answer"
            result, failure = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)
            answers.append((result, failure))
        failures = [f"rank {rank}:\n{failure}" for rank, (_, failure) in enumerate(answers) if failure is not None]
        assert not failures, "\n".join(failures)
        return [result for result, _ in answers]

    def close(self):
        """End the processes."""
        for end, process in zip(self._ends, self._processes, strict=True):
            if process.is_alive():
                end.send(None)
            process.join(self._timeout)
            process.kill()


def _serve(rank, size, end, timeout):
    torch.set_num_threads(1)
    while (job := end.recv()) is not None:
        function, arguments, meeting_point = job
        result, failure = None, None
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting_point}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
            result = function(rank, *arguments)
        except Exception:
            failure = traceback.format_exc()
        finally:
            dist.destroy_process_group()
        answer = io.BytesIO()
        torch.save((result, failure), answer)
        end.send_bytes(answer.getvalue())
