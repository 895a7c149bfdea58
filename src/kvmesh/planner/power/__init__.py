"""Energy of a deployment: what machines draw, how few of them can serve a load, and what a fleet draws while it does.

    profile     watts and seconds of one instance by phase, batch and clock; the profiles that ship
    fitting     makes profiles from Splitwise's measurements, with the error on held-out points
    points      operating points: a profile at a clock and a batch, as columns of a program
    operation   which instances are on, at which point, with which share: a small MILP under a budget of watts
    accounting  joules, grams of CO2 and dollars from busy seconds
    instance    one model instance, replayed iteration by iteration
    fleet       a load replayed on instances that are switched, capped and given phases
    control     what switches and caps them

Watts here are those of the accelerators alone: hosts, switches and cooling are not in the measurements.
"""
