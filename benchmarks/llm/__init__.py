"""Language models in int4 on OpenVINO."""
