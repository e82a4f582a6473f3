"""From a trained adapter to what people use.

`merge.merge` and `export.export` write a model or a smaller adapter and prove that it is what was trained; `inspect.inspect`
and `report.write_report` show what training did; `card.write_card` and `push.push` publish it.
"""
