"""What all tables share: the MetaData with its naming convention, and the column types."""

from __future__ import annotations

from sqlalchemy import ARRAY, DateTime, MetaData, Text
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Json = JSONB(none_as_null=True)
Time = DateTime(timezone=True)
Texts = ARRAY(Text)
