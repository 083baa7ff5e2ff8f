"""A simulated world that is run by the production policy: `nearfield simulate`.

    scenario    what is simulated, strict: regions, pools, traffic, faults
    arrivals    who sends what when: generators, and traces (traces.py)
    engine      how long a request takes in a batch, one by one and in the mean
    fleet       replicas from launch to end: what they are, and what they cost
    parts       what a scenario becomes: regions, gateways, sources, scalers
    world       clock, health, scaling, spot and faults around `nearfield.policy`, for both modes
    events      every request by itself (lane.py: what a region's gateway knows of a pool)
    fluid       many requests as one (flow.py: what is in a pool)
    books       counts, latencies, and what must be true at every moment
    result      what came out, as plain data: `simulate(scenario, folder, step=…)`
    report      the same as a page
    calibrate   an engine's timings from a real run

Everything it says is simulated.
"""
