"""Requests: online traces and generators, offline backlogs. Knows nothing of the cluster that serves them.

requests.py   the record that everything here produces
trace.py      CSV files -> requests or length tables; where data files are looked for
lengths.py    prompt and output lengths        arrivals.py   arrival times (chain.py: their regimes)
sources.py    online sources: a generator or a trace, re-timed by a rate scale
offline.py    offline work: endless, a job list, or Poisson
build.py      the YAML of conf/workload and conf/offline -> the objects above
"""

from ooco_gym.workload.arrivals import Arrivals, DiurnalArrivals, MarkovArrivals, PoissonArrivals, Ticks
from ooco_gym.workload.build import offline_work, online_source
from ooco_gym.workload.lengths import FixedLengths, Lengths, MixtureLengths, TableLengths
from ooco_gym.workload.offline import OfflineJobs, OfflineWork
from ooco_gym.workload.requests import Requests
from ooco_gym.workload.sources import OnlineSource, SyntheticSource, TraceSource
from ooco_gym.workload.trace import find_data, read_lengths, read_trace

__all__ = [
    "Arrivals",
    "DiurnalArrivals",
    "FixedLengths",
    "Lengths",
    "MarkovArrivals",
    "MixtureLengths",
    "OfflineJobs",
    "OfflineWork",
    "OnlineSource",
    "PoissonArrivals",
    "Requests",
    "SyntheticSource",
    "TableLengths",
    "Ticks",
    "TraceSource",
    "find_data",
    "offline_work",
    "online_source",
    "read_lengths",
    "read_trace",
]
