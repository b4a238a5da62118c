"""Load tests of OpenAI-compatible chat servers: workloads as data, one lean client, reports."""
