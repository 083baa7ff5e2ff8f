"""A simulated world that is run by the production policy: `nearfield simulate`.

    scenario    what is simulated, strict: regions, pools, traffic, faults
    arrivals    who sends what when: generators, and traces (traces.py)
    engine      how long a request takes in a batch, one by one and in the mean
    fleet       replicas from launch to end: boots, spot, faults, what they cost
    world       clock, gateways and scaling around `nearfield.policy`, for both modes
    events      every request by itself
    fluid       many requests as one
    books       what came out, and what must be true at every moment
    report      the same as a page
    calibrate   an engine's timings from a real run

Everything it says is simulated.
"""
