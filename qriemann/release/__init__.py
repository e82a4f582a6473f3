"""From a trained adapter to what people use: a merged model, a smaller adapter, and the proof that it is what was trained."""
