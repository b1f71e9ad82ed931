"""From facts to pages: build (report.json, the truth), gates, claims, recommend; tables and render draw it."""
