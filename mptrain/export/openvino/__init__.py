"""OpenVINO IR: convert, half (fp32 islands), weights (compressed constants), runner, facts."""
