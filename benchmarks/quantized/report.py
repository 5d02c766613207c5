def write(results, tasks):
    pass
