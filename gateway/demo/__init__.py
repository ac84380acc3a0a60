"""`justitia demo`: one trace of agents, one real engine, two policies, and what changed.

demo          runs all of it with a tiny model on the spot
settings      its settings
workload      makes the trace, of the `kinds` of agents
client        replays the trace against a live gateway, as the agents' own programs would
engine_watch  listens to the engine's reports meanwhile
processes     starts and stops the servers
progress      shows how far a replay has come
report        turns results into JSON and a table; `picture` draws them
"""
