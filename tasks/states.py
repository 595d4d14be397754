"""The states of jobs as SQL: the guards of statements, and the trigger that refuses every change but the transitions.

Both are made from `device_operations.jobs.TRANSITIONS`. A migration holds the trigger as it was made from the table of
its time: whoever changes the table adds a migration with `trigger()` as it is then, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Collection

from device_operations.jobs import FOLLOWING, State

#: The name of the trigger on `jobs`, and of its function.
TRIGGER = "refuse_transition"


def listed(states: Collection[State]) -> str:
    """States as SQL, for `state IN …`: `('queued', 'running')`, in the order of the enum."""
    return "(" + ", ".join(f"'{state}'" for state in State if state in states) + ")"


def trigger() -> tuple[str, str]:
    """The statements that make the function and its trigger.

    The condition stands in the function, which a connection plans once: PostgreSQL reads the `WHEN` of a trigger anew
    for each statement, which made an UPDATE of one job twice as expensive.
    """
    cases = [
        f"WHEN '{state}' THEN\n                NEW.state IN {listed(after)}"
        for state, after in FOLLOWING.items()
        if after
    ]
    allowed = "\n            ".join(cases)
    return (
        f"""
    CREATE FUNCTION {TRIGGER}() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.state <> OLD.state AND NOT (CASE OLD.state
            {allowed}
            ELSE false END) THEN
            RAISE EXCEPTION 'job % is %, and cannot become %', OLD.id, OLD.state, NEW.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$
""",
        f"""
    CREATE TRIGGER {TRIGGER} BEFORE UPDATE OF state ON jobs FOR EACH ROW EXECUTE FUNCTION {TRIGGER}()
""",
    )
