"""From measurements to a page: charts, liveness pictures, tables, the papers' figures beside ours."""
