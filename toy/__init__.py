"""The embedded world: drawn shapes, a checker that reads them back from pixels, and small trained weights."""
