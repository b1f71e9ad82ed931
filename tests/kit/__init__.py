"""What tests share; no test imports another test.

tiny, tiny_models, tiny_tasks: models of every family, data and recipes that run in seconds. jobs: a recipe run as a
user runs it, and what must not depend on interruptions. records, coreml, coreai_constants, mil, kernels, training,
text_encoder: inputs and contracts of one area. report_sample: a made-up report.
"""
