"""The benchmarks behind `fovea bench`: each prints its tables and writes one JSON file with what they were made on."""
