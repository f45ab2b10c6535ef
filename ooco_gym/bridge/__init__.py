"""The bridge: a policy that won in simulation, exported and put in front of live servers under the same contract."""
